"""Several sources in a run: the held-out loss of each, mixing and streaming, also across an interruption."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.support.runs import build, run_settings, train, write_rows
from tunesmith.config.load import load_settings
from tunesmith.config.summary import print_result
from tunesmith.contracts.errors import ConfigError, UserError
from tunesmith.contracts.events import Evaluated
from tunesmith.data.stream import StreamFeed
from tunesmith.training.console import ConsoleView
from tunesmith.training.evaluate import held_out_loss
from tunesmith.training.metrics import EventLog, read_events


@pytest.fixture
def settings(tiny_model_dir: Path, tmp_path: Path):
    def make(folder: str = "one", **sections: dict[str, Any]) -> dict[str, Any]:
        (tmp_path / folder).mkdir(exist_ok=True)
        made = run_settings(tiny_model_dir, tmp_path / folder, **sections)
        second = write_rows(tmp_path / "second.jsonl", 60, seed=9)
        first = write_rows(tmp_path / "first.jsonl", 40)
        made["data"]["train"] = [{"path": str(first), "weight": 3.0}, {"path": str(second)}]
        return made

    return make


def streaming(made: dict[str, Any], tmp_path: Path, **data: Any) -> dict[str, Any]:
    held = write_rows(tmp_path / "held.jsonl", 8, seed=4)
    made["data"] |= {
        "streaming": True,
        "buffer_tokens": 600,
        "mix": {"strategy": "interleave"},
        "eval": [{"path": str(held)}],
        **data,
    }
    return made


def test_the_held_out_loss_of_each_source_beside_the_mean(settings):
    run, recorder = build(settings(data={"eval": {"fraction": 0.2}}))
    with run.packed():
        run.trainer._evaluate()
        event = recorder.of("eval")[0]
        assert list(event.by_source) == run.data.corpus.names
        weights = []
        for name, own_N in zip(
            run.data.corpus.names, run.data.corpus.by_source(run.data.held_out_N), strict=True
        ):
            assert len(own_N)
            alone = held_out_loss(
                run.causal, run.data.corpus, own_N, max_tokens=64, autocast=run.backend.autocast()
            )
            assert event.by_source[name] == pytest.approx(alone.loss, rel=1e-5)
            assert alone.by_source == {}, "one source has no loss beside the mean"
            located = (run.data.corpus.locate(d) for d in own_N)
            weights.append(sum(int(source.trained(index)[1:].sum()) for source, index in located))
    mean = sum(w * loss for w, loss in zip(weights, event.by_source.values(), strict=True)) / sum(weights)
    assert event.loss == pytest.approx(mean, rel=1e-6)
    assert len(set(event.by_source.values())) == 2


def test_the_losses_of_sources_are_in_the_events_of_a_run(settings):
    result = train(settings(data={"eval": {"fraction": 0.2}}, train={"steps": 2}))
    evals = [event for event in read_events(result.dir / "events.jsonl") if event["event"] == "eval"]
    assert all(len(event["by_source"]) == 2 for event in evals)


def test_the_losses_of_sources_are_printed_and_written_also_where_they_are_not_finite(tmp_path):
    event = Evaluated(
        step=3, loss=1.5, tokens=9, seconds=0.1, by_source={"a.jsonl": 1.0, "b.jsonl": math.nan}
    )
    console = Console(width=80, record=True, file=io.StringIO())
    ConsoleView(console).on_event(event)
    assert console.export_text().splitlines() == [
        "held-out loss at step 3: 1.5000",
        "  1.0000 a.jsonl",
        "  nan b.jsonl",
    ]
    log = EventLog(tmp_path / "events.jsonl")
    log.on_event(event)
    log.close()
    assert read_events(tmp_path / "events.jsonl")[0]["by_source"] == {"a.jsonl": 1.0, "b.jsonl": "nan"}


@pytest.mark.parametrize("way", ["interleave", "stream"])
def test_a_run_that_goes_on_equals_one_that_never_stopped(settings, tmp_path, way):
    def made(folder: str) -> dict[str, Any]:
        sections = settings(
            folder, train={"steps": 9}, output={"save_every": 4}, data={"mix": {"strategy": "interleave"}}
        )
        return streaming(sections, tmp_path) if way == "stream" else sections

    whole, events = build(made("whole"))
    with whole.packed():
        outcome = whole.trainer.train()
    part, _ = build(made("part"))
    original = part.trainer._run_step

    def stop_in_step_seven(data):
        if part.trainer.step == 6:
            raise KeyboardInterrupt
        original(data)

    part.trainer._run_step = stop_in_step_seven
    with part.packed(), pytest.raises(KeyboardInterrupt):
        part.trainer.train()
    rest, later = build(made("part"))
    rest.trainer.resume(rest.store.newest_intact(lambda path, reason: pytest.fail(reason)))
    assert rest.trainer.step == 4
    assert (rest.trainer.position.stream is not None) == (way == "stream")
    with rest.packed():
        resumed = rest.trainer.train()
    assert [e.loss for e in later.of("step")] == [e.loss for e in events.of("step")][4:]
    assert resumed.last_eval == outcome.last_eval
    for name, parameter in whole.backend.trained_parameters().items():
        assert torch.equal(parameter, rest.backend.trained_parameters()[name])


def test_a_stream_trains_writes_no_tokens_and_lowers_the_loss(settings, tmp_path):
    made = streaming(settings(adapter={"kind": "none"}, train={"steps": 30, "learning_rate": 1e-2}), tmp_path)
    run, events = build(made)
    assert isinstance(run.data.feed, StreamFeed)
    assert len(list((tmp_path / "one" / "tokens").iterdir())) == 1, "the held-out table only"
    with run.packed():
        outcome = run.trainer.train()
    assert outcome.last_eval < 0.8 * outcome.first_eval
    assert run.data.reports[0][1].rows_in > 0
    steps = events.of("step")
    assert steps[-1].epoch >= 1
    assert all(step.tokens > 0 for step in steps)


def test_a_fault_in_a_stream_names_its_rows_and_the_step_comes_again(settings, tmp_path):
    run, _ = build(streaming(settings(), tmp_path))
    loss, places = run.trainer.loss, []

    class Poisoned(type(loss)):
        def __call__(self, batch, total):
            return super().__call__(batch, total) * (float("nan") if run.trainer.step == 2 else 1.0)

    run.trainer.loss = Poisoned(loss.causal, loss.objective)
    original = run.trainer._run_step
    run.trainer._run_step = lambda data: (places.append(data.position), original(data))
    with run.packed(), pytest.raises(UserError, match="step 3 is not finite"):
        run.trainer.train()
    report = json.loads((run.trainer.run_dir / "faults" / "step-00000003.json").read_text())
    assert all(".jsonl:" in row for batch in report["micro_batches"] for row in batch["rows"])
    assert run.trainer.position == places[1]


@pytest.mark.parametrize(
    ("data", "steps", "said"),
    [
        ({}, None, "how many steps"),
        ({"eval": {"fraction": 0.1}}, 5, "taken out of a stream"),
        ({"mix": {"strategy": "concatenate"}}, 5, "strategy: interleave"),
        ({"buffer_tokens": 100}, 5, "at least one row"),
    ],
)
def test_what_a_stream_cannot_do_is_said_before_it_starts(settings, tmp_path, data, steps, said):
    with pytest.raises(ConfigError, match=said):
        load_settings(streaming(settings(train={"steps": steps}), tmp_path, **data))


def test_another_mix_is_another_run(settings):
    train(settings(train={"steps": 2}))
    with pytest.raises(UserError, match=r"data\.mix was None"):
        train(settings(train={"steps": 4}, data={"mix": {"strategy": "interleave"}}))


def test_the_losses_of_sources_are_in_the_summary(settings):
    result = train(settings(data={"eval": {"fraction": 0.2}}, train={"steps": 2}))
    evals = [
        event["by_source"] for event in read_events(result.dir / "events.jsonl") if event["event"] == "eval"
    ]
    console = Console(width=80, record=True, file=io.StringIO())
    print_result(console, result)
    printed = console.export_text()
    assert len(result.by_source) == 2
    for name, losses in result.by_source.items():
        assert losses == (evals[0][name], evals[-1][name])
        assert f"{name}: {losses[0]:.4f} → {losses[1]:.4f}" in printed


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("data", [{"overlong": "split", "overlap": 4}, {"join_texts": True}])
def test_texts_in_pieces_train(settings, tmp_path, streamed: bool, data: dict[str, Any]):
    """From a table and from a stream."""
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": "again " * (n * 29 % 97 + 2)}) + "\n" for n in range(30)))
    made = settings(train={"steps": 4}, output={"save_every": 2})
    made["data"] |= {"train": [{"path": str(texts)}], "eval": {"fraction": 0}, **data}
    if streamed:
        made["data"] |= {"streaming": True, "buffer_tokens": 500}
    whole = train(made)
    losses = [event["loss"] for event in read_events(whole.dir / "events.jsonl") if event["event"] == "step"]
    assert len(losses) == 4
    assert all(map(math.isfinite, losses))
