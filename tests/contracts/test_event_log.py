"""Events are read whatever state their file is in."""

from __future__ import annotations

import json
from pathlib import Path

from tunesmith.contracts.event_log import read_events


def test_what_is_no_event_is_left_out_and_what_is_new_stays(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    whole = [{"event": "step", "step": 1}, {"event": "of a newer version", "step": 2, "x": [1]}]
    lines = [
        json.dumps(whole[0]),
        "[1, 2]",
        "7",
        '{"step": 1}',
        '{"event": "step"}',
        '{"event": "step", "step": "1"}',
        '{"event": "step", "step": true}',
        '{"event": "step", "step": -1}',
        '{"event": 3, "step": 1}',
        "",
        json.dumps(whole[1]),
    ]
    path.write_bytes("\n".join(lines).encode() + b'\n\xff\xfe\n{"event": "step", "st')

    assert read_events(path) == whole


def test_no_file_has_no_events(tmp_path: Path) -> None:
    assert read_events(tmp_path / "events.jsonl") == []
    assert read_events(tmp_path) == []
