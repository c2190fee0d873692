"""Events on disk and the loss curve."""

from __future__ import annotations

import json
import math
from pathlib import Path

from tests.support.events import stepped
from tunesmith.contracts.events import Underway, Warned
from tunesmith.training.metrics import EventLog, read_events


def test_events_are_strict_json_lines_also_where_a_loss_is_not_finite(tmp_path: Path):
    log = EventLog(tmp_path / "events.jsonl")
    shown = Underway(step=2, what="held-out loss", done=1, total=2)  # for those who watch
    for event in (stepped(1, loss=2.0), stepped(2, loss=math.nan), shown, Warned(step=2, message="careful")):
        log.on_event(event)
    log.close()
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=lambda name: 1 / 0) for line in lines]
    assert [record["event"] for record in records] == ["step", "step", "warning"]
    assert records[1]["loss"] == "nan"


def test_going_on_drops_the_events_of_steps_that_run_again(tmp_path: Path):
    log = EventLog(tmp_path / "events.jsonl")
    for number in range(1, 6):
        log.on_event(stepped(number, loss=1.0))
    log.close()
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"event": "step", "st')  # cut off by a kill
    assert len(read_events(tmp_path / "events.jsonl")) == 5
    log = EventLog(tmp_path / "events.jsonl", keep_until=3)
    log.on_event(stepped(4, loss=0.5))
    log.close()
    assert [(e["step"], e["loss"]) for e in read_events(tmp_path / "events.jsonl")] == [
        (1, 1.0), (2, 1.0), (3, 1.0), (4, 0.5),
    ]  # fmt: skip


def test_a_new_run_starts_an_empty_file(tmp_path: Path):
    (tmp_path / "events.jsonl").write_text('{"event": "step", "step": 1}\n')
    EventLog(tmp_path / "events.jsonl").close()
    assert read_events(tmp_path / "events.jsonl") == []
