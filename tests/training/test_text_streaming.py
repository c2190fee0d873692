"""Pretraining from streams, end to end: text files, rows of text, the hub and the web, and going on with one."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from tests.support.runs import build, run_settings, train
from tests.support.web import Site, serving
from tunesmith.contracts.errors import DataError
from tunesmith.data.cache import cache_folder

WORDS = "natalia sold clips to her friends in april and then half as many in may".split()  # noqa: SIM905


def texts(count: int, seed: int) -> list[str]:
    """Lines of 3 to 60 words."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 60))) for _ in range(count)]


@pytest.fixture
def site() -> Iterator[Site]:
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts(60, seed=3))
    with serving(files={"/web.jsonl.gz": gzip.compress(rows.encode())}) as found:
        yield found


@pytest.fixture
def settings(tiny_model_dir: Path, tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "lines.txt").write_text("\n".join(texts(80, seed=1)))
    rows = [json.dumps({"text": text, "url": "x"}) for text in texts(70, seed=2)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "held.txt").write_text("\n".join(texts(8, seed=9)))
    hub = datasets.Dataset.from_list([{"text": text} for text in texts(50, seed=4)])

    def load(path: str, **options: Any) -> Any:
        assert options["streaming"], "a stream is not downloaded first"
        return hub.to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)

    def make(folder: str, paths: list[str], **sections: dict[str, Any]) -> dict[str, Any]:
        (tmp_path / folder).mkdir(exist_ok=True)
        made = run_settings(
            tiny_model_dir,
            tmp_path / folder,
            adapter={"kind": "none"},
            train={"steps": 12, "global_batch": 2, "learning_rate": 1e-2} | sections.pop("train", {}),
            **sections,
        )
        made["data"] |= {
            "train": [{"path": path} for path in paths],
            "eval": [{"path": str(tmp_path / "held.txt")}],
            "mix": {"strategy": "interleave"},
            "streaming": True,
            "buffer_tokens": 1500,
        } | sections.get("data", {})
        return made

    return make


@pytest.fixture
def everywhere(tmp_path: Path, site: Site) -> list[str]:
    return [
        str(tmp_path / "lines.txt"),
        str(tmp_path / "rows.jsonl"),
        "org/texts",
        f"{site.url}/web.jsonl.gz",
    ]


@pytest.mark.parametrize("join", [False, True], ids=["apart", "joined"])
def test_text_of_four_kinds_of_sources_trains(settings, everywhere: list[str], join: bool) -> None:
    run, events = build(settings("run", everywhere, data={"join_texts": join}))
    with run.packed():
        outcome = run.trainer.train()
    assert outcome.last_eval < 0.8 * outcome.first_eval
    reports = dict(run.data.reports[:4])
    assert list(reports) == everywhere
    for report in reports.values():
        assert report.format == "text"
        assert report.rows_kept > 8
        assert not report.rows_in - report.rows_kept
    steps = events.of("step")
    # every token of a text trains but its first; joined texts are cut with an overlap of one
    assert all(0.8 < step.supervised_tokens / step.tokens < 1 for step in steps)
    assert not list(cache_folder("remote").glob("*")), "nothing is written"


def test_a_text_stream_goes_on_bit_for_bit(settings, everywhere: list[str]) -> None:
    whole, events = build(settings("whole", everywhere, output={"save_every": 7}))
    with whole.packed():
        whole.trainer.train()
    torch.manual_seed(12345)  # a resumed process starts from other random state
    rest, later = build(settings("whole", everywhere, output={"save_every": 7}))
    rest.trainer.resume(next(found for found in rest.store.all() if found.step == 7))
    with rest.packed():
        rest.trainer.train()
    assert [step.loss for step in later.of("step")] == [step.loss for step in events.of("step")][7:]
    ours, theirs = rest.backend.trained_parameters(), whole.backend.trained_parameters()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_stream_reads_the_documents_that_a_table_holds(settings, tmp_path: Path) -> None:
    """A pass over the stream and an epoch over the table train the same rows."""
    path = str(tmp_path / "lines.txt")
    made = settings("run", [path], train={"packing": False})
    run, _ = build(made)
    seen: list[str] = []
    for step in run.data.feed.steps(run.trainer.position):
        if step.epochs >= 1:
            break
        seen += [step.corpus.where(document) for row in step.rows for document in row]
    assert len(set(seen)) >= 78, "a step may reach into the next pass"
    made["data"] |= {"streaming": False, "eval": {"fraction": 0.0}}
    made["output"]["dir"] = str(tmp_path / "table")
    table, _ = build(made)
    assert set(seen) <= {table.data.corpus.where(document) for document in table.data.train_N.tolist()}


def test_a_remote_file_that_vanishes_ends_the_run_in_a_sentence(settings, site: Site) -> None:
    made = settings("run", [f"{site.url}/web.jsonl.gz"], train={"steps": 500})
    run, events = build(made)
    original = run.trainer._run_step

    def vanish(data: Any) -> None:
        site.status = 404
        original(data)

    run.trainer._run_step = vanish
    with run.packed(), pytest.raises(DataError, match="There is no file http"):
        run.trainer.train()
    assert events.of("step")


def test_secrets_of_an_address_are_not_in_the_run_directory(settings, site: Site, tmp_path: Path) -> None:
    made = settings("run", [f"{site.url}/web.jsonl.gz?token=s3cr3t".replace("://", "://me:s3cr3t@")])
    made["data"] |= {"streaming": False, "eval": [{"path": f"{site.url}/web.jsonl.gz?sig=s3cr3t"}]}
    result = train(made)
    files = [path for path in result.dir.rglob("*") if path.is_file()]
    assert any(b"web.jsonl.gz?token=" in path.read_bytes() for path in files if path.name == "run.yaml")
    assert [path for path in files if b"s3cr3t" in path.read_bytes()] == []
