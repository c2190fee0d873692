"""Whole runs small enough for the fast tests: a tiny model, a few dozen conversations."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from rich.console import Console

from tunesmith.config.assemble import Run, assemble
from tunesmith.config.execute import execute
from tunesmith.config.load import load_settings
from tunesmith.config.result import RunResult
from tunesmith.contracts.events import Event

_WORDS = "natalia sold clips to her friends in april and then half as many in may".split()  # noqa: SIM905


def write_rows(path: Path, count: int, seed: int = 0) -> Path:
    """Question and answer rows of varying length."""
    rng = random.Random(seed)

    def words(most: int) -> str:
        return " ".join(rng.choices(_WORDS, k=rng.randint(1, most)))

    rows = [{"question": words(12), "answer": words(20)} for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run_settings(
    model_dir: Path, folder: Path, *, rows: int = 40, **sections: dict[str, Any]
) -> dict[str, Any]:
    """A run file as a dict; keyword arguments are merged into its sections."""
    data = write_rows(folder / "rows.jsonl", rows)
    settings: dict[str, dict[str, Any]] = {
        "model": {"name": str(model_dir)},
        "adapter": {"rank": 4, "alpha": 8.0},
        "data": {
            "train": [{"path": str(data)}],
            "eval": {"fraction": 0.1},
            "cache_dir": str(folder / "tokens"),
        },
        "train": {
            "sequence_length": 128,
            "global_batch": 4,
            "steps": 6,
            "learning_rate": 5.0e-3,
            "warmup": 0.0,
        },
        "output": {"dir": str(folder / "run"), "save_every": None, "eval_every": 100},
    }
    for name, changes in sections.items():
        settings.setdefault(name, {}).update(changes)
    return settings


class Recorder:
    """Observer that remembers."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def on_event(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: str) -> list[Any]:
        """The events of one kind."""
        return [event for event in self.events if event.kind == kind]


def build(settings: dict[str, Any]) -> tuple[Run, Recorder]:
    """Assemble a run and watch it."""
    folder = Path(settings["output"]["dir"])
    folder.mkdir(parents=True, exist_ok=True)
    run = assemble(load_settings(settings), folder)
    recorder = Recorder()
    run.trainer.observers.append(recorder)
    return run, recorder


def train(settings: dict[str, Any]) -> RunResult:
    """The whole way, silently."""
    return execute(load_settings(settings), Console(quiet=True))
