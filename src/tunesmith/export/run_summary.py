"""`Summary`: a run in one line of figures, for lists and comparisons. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path, PurePath
from typing import Any

from tunesmith.contracts.best import best_step
from tunesmith.contracts.event_log import EVENTS, read_events
from tunesmith.export.curves import Events, final_loss, number, of_kind, series
from tunesmith.export.run_files import SETTINGS, is_running, read_settings, sparse_events

STATES = ("finished", "running", "interrupted", "failed")
"""How a run stands. `failed`: it ended with an error, or was killed, and said nothing more."""

_STATE_OF = {"interrupted": "interrupted", "non-finite": "failed"}
"""Reasons of an end that are none of a finished run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a run was and came to; None where it is not known.

    Attributes:
        name: the directory as it was found.
        model: name of the base model.
        adapter: what trained, such as `lora 16 nf4` or `full`.
        data: the training sources.
        objective: what was minimised.
        state: one of `STATES`.
        reason: why training ended, in the event's own word.
        steps: optimizer steps that are complete, of `total_steps`.
        first_eval: held-out loss before training (or at its first measurement), `last_eval` the last, `best_eval`
            the lowest one, at step `best_step`.
        train_loss: mean training loss of the last steps.
        tokens_per_second: tokens of the steps over their seconds.
        memory_gib: peak memory in GiB.
        seconds: wall time of training, over all parts of an interrupted run.
        when: seconds since the epoch at which the run last wrote an event.
    """

    name: str
    model: str | None
    adapter: str | None
    data: str | None
    objective: str | None
    state: str
    reason: str | None
    steps: int
    total_steps: int | None
    first_eval: float | None
    last_eval: float | None
    best_eval: float | None
    best_step: int | None
    train_loss: float | None
    tokens_per_second: float | None
    memory_gib: float | None
    seconds: float | None
    when: float

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON, with the time as ISO 8601 text."""
        return {
            **asdict(self),
            "when": datetime.fromtimestamp(self.when).astimezone().isoformat("T", "seconds"),
        }


def read_summary(folder: Path) -> Summary:
    """The summary of a run directory, from some of its steps."""
    return summarise(
        folder, sparse_events(folder / EVENTS), read_settings(folder), running=is_running(folder)
    )


def summarise(folder: Path, events: Events, settings: dict[str, Any], *, running: bool) -> Summary:
    """The summary of a run.

    Args:
        events: all of its events, or with some of its steps only.
        settings: as in its run file; may be empty.
        running: whether a process trains in the directory.
    """
    starts, ends, steps = (of_kind(events, kind) for kind in ("start", "end", "step"))
    evals = series(events, "eval", "loss")
    by_step = {int(step): loss for step, loss in evals}
    best = best_step(by_step)
    ended = bool(ends) and events[-1]["event"] == "end"
    reason = str(ends[-1].get("reason")) if ended else None
    state = "running" if running else _STATE_OF.get(reason, "finished") if reason is not None else "failed"
    spent = sum(number(step, "seconds") or 0.0 for step in steps)
    tokens = sum(number(step, "tokens") or 0.0 for step in steps)
    total = number(starts[-1], "total_steps") if starts else None
    return Summary(
        name=str(folder),
        model=_text(settings, "model", "name"),
        adapter=adapter_of(settings),
        data=data_of(settings),
        objective=_text(settings, "objective", "kind"),
        state=state,
        reason=reason,
        steps=max((event["step"] for event in events), default=0),
        total_steps=None if total is None else int(total),
        first_eval=evals[0][1] if evals else None,
        last_eval=evals[-1][1] if evals else None,
        best_eval=None if best is None else by_step[best],
        best_step=best,
        train_loss=final_loss(events),
        tokens_per_second=tokens / spent if spent else None,
        memory_gib=max((number(step, "memory_gib") or 0.0 for step in steps), default=None),
        seconds=sum(map(_seconds, _parts(events))) if events else None,
        when=_when(folder),
    )


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a run directory holds.

    Attributes:
        folder: the directory.
        events: all events.
        settings: the run file as plain values.
        summary: its figures.
    """

    folder: Path
    events: list[dict[str, Any]]
    settings: dict[str, Any]
    summary: Summary


def read_run(folder: Path, *, running: bool | None = None) -> Recorded:
    """Everything that was recorded of a run.

    Args:
        running: whether a process trains in the directory; None looks.
    """
    events, settings = read_events(folder / EVENTS), read_settings(folder)
    active = is_running(folder) if running is None else running
    return Recorded(folder, events, settings, summarise(folder, events, settings, running=active))


def _parts(events: Events) -> Iterator[list[dict[str, Any]]]:
    """The events of each process that worked on the run."""
    part: list[dict[str, Any]] = []
    for event in events:
        if event["event"] == "start" and part:
            yield part
            part = []
        part.append(event)
    if part:
        yield part


def _seconds(part: Events) -> float:
    """Wall time of a part: what its end says, or, where it was killed, that of all that it did."""
    if part[-1]["event"] == "end" and (said := number(part[-1], "seconds")) is not None:
        return said
    steps, others = of_kind(part, "step"), [event for event in part if event["event"] not in ("step", "end")]
    count = steps[-1]["step"] - steps[0]["step"] + 1 if steps else 0  # not all of them may be there
    spent = sum(number(step, "seconds") or 0.0 for step in steps)
    each = spent / len(steps) if steps else 0.0
    return each * count + sum(number(event, "seconds") or 0.0 for event in others)


def _when(folder: Path) -> float:
    for name in (EVENTS, SETTINGS, ""):
        try:
            return (folder / name).stat().st_mtime
        except OSError:
            continue
    return 0.0


def value_at(settings: Any, *path: str) -> Any:
    """A setting by its path, or None where there is none."""
    for name in path:
        settings = settings.get(name) if isinstance(settings, dict) else None
    return settings


def _text(settings: Any, *path: str) -> str | None:
    value = value_at(settings, *path)
    return value if isinstance(value, str) else None


def adapter_of(settings: dict[str, Any]) -> str | None:
    """What trained, in a few words: `lora 16`, `dora 8 nf4`, `full`."""
    kind = _text(settings, "adapter", "kind")
    if kind is None:
        return None
    held = _text(settings, "model", "quantize")
    words = ["full" if kind == "none" else "dora" if value_at(settings, "adapter", "use_dora") else kind]
    if kind != "none":
        words += [str(value_at(settings, "adapter", "rank") or "")]
    words += [held] if held not in (None, "none") else []
    return " ".join(word for word in words if word)


def data_of(settings: dict[str, Any]) -> str | None:
    """The training sources in a few words: the name of the first one, and how many there are besides."""
    sources = value_at(settings, "data", "train")
    if not isinstance(sources, list) or not sources:
        return None
    return short(_text(sources[0], "path") or "?") + (f" + {len(sources) - 1}" if len(sources) > 1 else "")


def short(name: str) -> str:
    """A path on this machine by its last part; an id on the hub, which has one slash, as it is."""
    on_hub = name.count("/") == 1 and not name.startswith(("/", ".", "~")) and not PurePath(name).suffix
    return name if on_hub else PurePath(name).name or name
