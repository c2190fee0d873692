"""A run in one line of figures, in every state that a run directory can be in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_runs import START, end, evaluated, events_of, step, write_events, write_run
from tunesmith.export.run_summary import adapter_of, data_of, read_summary, short, summarise


def summary_of(events: list[dict[str, Any]], *, running: bool = False, **settings: Any):
    return summarise(Path("runs/a"), events, settings, running=running)


def test_a_finished_run(tmp_path: Path) -> None:
    found = read_summary(write_run(tmp_path / "a", adapter={"rank": 8}))

    assert (found.model, found.adapter, found.data, found.objective) == (
        "org/small-model",
        "lora 8",
        "rows.jsonl",
        "sft",
    )
    assert (found.state, found.reason, found.steps, found.total_steps) == ("finished", "complete", 20, 20)
    assert (found.first_eval, found.last_eval, found.best_eval, found.best_step) == (2.5, 1.25, 1.2, 10)
    assert found.train_loss == pytest.approx(sum(1 + 1 / n for n in range(11, 21)) / 10)
    assert (found.tokens_per_second, found.memory_gib, found.seconds) == (200.0, 1.5, 14.0)
    assert found.when == (tmp_path / "a" / "events.jsonl").stat().st_mtime
    assert found.to_json()["when"].startswith("20")


@pytest.mark.parametrize(
    ("reason", "state"),
    [("complete", "finished"), ("time", "finished"), ("early stop", "finished"), ("interrupted", "interrupted"),
     ("non-finite", "failed"), (None, "failed")],
)  # fmt: skip
def test_states(reason: str | None, state: str) -> None:
    assert summary_of(events_of(reason=reason)).state == state
    assert summary_of(events_of(reason=reason), running=True).state == "running"


def test_a_run_that_went_on_counts_all_its_parts() -> None:
    start = {"event": "start", "step": 0, **START}
    first = [start, evaluated(0, 3.0), *(step(n) for n in range(1, 5)), end(4, "interrupted", 10.0)]
    killed = [{**start, "step": 4}, *(step(n, seconds=2.0) for n in range(5, 9))]
    last = [{**start, "step": 8}, step(9), evaluated(9, 1.0), end(9, "complete", 5.0)]

    assert summary_of([*first, *killed, *last]).seconds == 10.0 + 8.0 + 5.0
    assert summary_of([*first, *killed]).state == "failed"
    assert summary_of([*first, *killed]).seconds == 18.0
    assert summary_of([*first, *killed, *last]).first_eval == 3.0


def test_the_time_of_a_killed_run_is_told_from_some_of_its_steps(tmp_path: Path) -> None:
    events = events_of(2000, reason=None)
    sparse = read_summary(write_events(tmp_path, events))

    assert sparse.seconds == pytest.approx(summary_of(events).seconds, rel=1e-6)
    assert sparse.seconds == pytest.approx(2000 * 0.5 + 3 * 1.0 + 1.0)
    assert sparse.steps == 2000


@pytest.mark.parametrize(
    "events", [[], [{"event": "start", "step": 0}], [{"event": "new", "step": 3, "loss": 1.0}]]
)
def test_a_run_that_has_just_begun_has_no_figures(events: list[dict[str, Any]]) -> None:
    found = summary_of(events)

    assert (found.state, found.train_loss, found.last_eval, found.tokens_per_second) == (
        "failed",
        None,
        None,
        None,
    )


def test_figures_that_are_not_finite_are_not_known() -> None:
    events = [evaluated(0, "nan"), step(1, loss="inf", seconds="nan", memory_gib=None)]  # type: ignore[arg-type]

    found = summary_of(events)
    assert (found.first_eval, found.train_loss, found.tokens_per_second) == (None, None, None)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"adapter": {"kind": "none"}}, "full"),
        ({"adapter": {"kind": "lora", "rank": 16}, "model": {"quantize": "none"}}, "lora 16"),
        (
            {"adapter": {"kind": "lora", "rank": 8, "use_dora": True}, "model": {"quantize": "nf4"}},
            "dora 8 nf4",
        ),
        ({"adapter": {"kind": "none"}, "model": {"quantize": "fp8"}}, "full fp8"),
        ({"adapter": 3}, None),
        ({}, None),
    ],
)
def test_what_trained_in_a_few_words(settings: dict[str, Any], text: str | None) -> None:
    assert adapter_of(settings) == text


@pytest.mark.parametrize(
    ("sources", "text"),
    [
        ([{"path": "data/train.jsonl"}], "train.jsonl"),
        ([{"path": "/srv/data/chats"}, {"path": "x"}], "chats + 1"),
        ([{"path": "openai/gsm8k"}], "openai/gsm8k"),
        ([3], "?"), ([], None), ("x", None), (None, None),
    ],
)  # fmt: skip
def test_data_in_a_few_words(sources: Any, text: str | None) -> None:
    assert data_of({"data": {"train": sources}}) == text


def test_a_path_is_its_last_part_and_an_id_is_whole() -> None:
    assert [short(name) for name in ("org/model", "/a/b/model", "../model", "~/m", "model")] == [
        "org/model", "model", "model", "m", "model",
    ]  # fmt: skip
