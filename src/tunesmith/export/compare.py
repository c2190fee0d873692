"""Runs beside each other: the settings in which they differ and what each came to. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.export.curves import number, of_kind
from tunesmith.export.run_files import VERSIONS, read_json
from tunesmith.export.run_summary import Recorded

MISSING = "–"
"""Stands for a setting that a run does not have."""

_IGNORED = ("output.dir",)
"""Settings that differ between any two runs and say nothing."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What tells runs apart.

    Attributes:
        names: of the runs, as short as they are distinct.
        settings: values of each run for the settings that differ, by dotted name.
        versions: the same of the versions of packages.
        figures: what each run came to, by name; None where it is not known.
        notes: what to keep in mind when they are compared.
    """

    names: list[str]
    settings: dict[str, list[Any]]
    versions: dict[str, list[Any]]
    figures: dict[str, list[Any]]
    notes: list[str]


def compare(runs: Sequence[Recorded]) -> Comparison:
    """Compare two runs or more."""
    found = [flat(run.settings) for run in runs]
    return Comparison(
        names=_names(runs),
        settings=_differing([{k: v for k, v in each.items() if k not in _IGNORED} for each in found]),
        versions=_differing([read_json(run.folder / VERSIONS) for run in runs]),
        figures={name: [figure(run) for run in runs] for name, figure in _FIGURES.items()},
        notes=_notes(runs),
    )


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names; entries of lists of sections by number."""
    if isinstance(value, dict) and value:
        children = value.items()
    elif isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        children = {str(number): entry for number, entry in enumerate(value)}.items()
    else:
        return {name: value}
    found: dict[str, Any] = {}
    for key, child in children:
        found |= flat(child, f"{name}.{key}" if name else str(key))
    return found


def _differing(values: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for each in values for name in each)
    rows = {name: [each.get(name, MISSING) for each in values] for name in names}
    return {name: row for name, row in rows.items() if any(value != row[0] for value in row[1:])}


def _names(runs: Sequence[Recorded]) -> list[str]:
    short = [run.folder.resolve().name for run in runs]
    return short if len(set(short)) == len(short) else [str(run.folder) for run in runs]


def _of_start(name: str) -> Callable[[Recorded], Any]:
    def found(run: Recorded) -> Any:
        starts = of_kind(run.events, "start")
        return starts[-1].get(name) if starts else None

    return found


def _tokens(run: Recorded) -> int:
    return int(sum(number(step, "tokens") or 0 for step in of_kind(run.events, "step")))


_FIGURES: dict[str, Callable[[Recorded], Any]] = {
    "state": lambda run: run.summary.state,
    "first held-out loss": lambda run: run.summary.first_eval,
    "last held-out loss": lambda run: run.summary.last_eval,
    "best held-out loss": lambda run: run.summary.best_eval,
    "training loss": lambda run: run.summary.train_loss,
    "steps": lambda run: run.summary.steps,
    "tokens": _tokens,
    "tokens/s": lambda run: run.summary.tokens_per_second,
    "peak memory": lambda run: run.summary.memory_gib,
    "time": lambda run: run.summary.seconds,
    "trained parameters": _of_start("trained_parameters"),
    "device": _of_start("device"),
}
"""What is shown of each run side by side."""


def _notes(runs: Sequence[Recorded]) -> list[str]:
    """What makes figures of these runs incomparable."""
    notes = []
    measured = [_held_out_tokens(run) for run in runs]
    if len(set(measured) - {None}) > 1:
        counts = ", ".join(MISSING if count is None else f"{count:,}" for count in measured)
        notes.append(f"The held-out losses are of different data ({counts} tokens) and do not compare.")
    if any(run.summary.state != "finished" for run in runs):
        notes.append("Not all of these runs are finished.")
    return notes


def _held_out_tokens(run: Recorded) -> int | None:
    evals = of_kind(run.events, "eval")
    count = number(evals[-1], "tokens") if evals else None
    return None if count is None else int(count)
