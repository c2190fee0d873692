"""Run directories as a run leaves them, made without training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunesmith.config.load import load_settings
from tunesmith.config.run_dir import write_run_files

START = {"total_steps": 20, "resumed": False, "trained_parameters": 1234, "device": "cpu"}


def step(number: int, **changes: Any) -> dict[str, Any]:
    """The event of a step; its loss is 2 at the first and falls to 1."""
    values = {
        "epoch": 0.1, "loss": 1 + 1 / number, "grad_norm": 0.5, "learning_rate": 1e-4, "tokens": 100,
        "supervised_tokens": 50, "tokens_per_second": 200.0, "supervised_tokens_per_second": 100.0, "seconds": 0.5,
        "memory_gib": 1.5, "loss_scale": 1.0, "applied": True,
    }  # fmt: skip
    return {"event": "step", "step": number, **values, **changes}


def evaluated(number: int, loss: float, **changes: Any) -> dict[str, Any]:
    """The event of a held-out loss."""
    return {
        "event": "eval",
        "step": number,
        "loss": loss,
        "tokens": 70,
        "seconds": 1.0,
        "by_source": {},
        **changes,
    }


def end(number: int, reason: str = "complete", seconds: float = 14.0) -> dict[str, Any]:
    """The event of an end."""
    return {"event": "end", "step": number, "reason": reason, "seconds": seconds}


def events_of(
    steps: int = 20, *, last: float = 1.25, reason: str | None = "complete"
) -> list[dict[str, Any]]:
    """The events of a whole run with a held-out loss before, in the middle (the lowest, 1.2) and after."""
    found = [{"event": "start", "step": 0, **START, "total_steps": steps}, evaluated(0, 2.5)]
    for number in range(1, steps + 1):
        found.append(step(number))
        if number == steps // 2:
            found.append(evaluated(number, 1.2))
    found.append(evaluated(steps, last))
    found.append({"event": "checkpoint", "step": steps, "path": "checkpoints/step", "seconds": 1.0})
    return [*found, end(steps, reason)] if reason is not None else found


def write_events(folder: Path, events: Sequence[dict[str, Any]]) -> Path:
    """Write `events.jsonl` into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "events.jsonl").write_text(
        "".join(json.dumps(event) + "\n" for event in events), encoding="utf-8"
    )
    return folder


def write_run(folder: Path, events: Sequence[dict[str, Any]] | None = None, **sections: Any) -> Path:
    """Write a run directory; keyword arguments replace sections of its run file."""
    write_events(folder, events_of() if events is None else events)
    settings = {
        "model": {"name": "org/small-model"},
        "data": {"train": [{"path": "data/rows.jsonl"}]},
        "output": {"dir": str(folder)},
    }
    write_run_files(folder, load_settings(settings | sections))
    return folder
