"""The observer that tells TensorBoard, Weights & Biases and their like what happens: the rows are in `tracker_rows`.

A tracker never decides over a run. One that cannot be opened, or that fails in the middle, becomes one warning and is
switched off. Where a run goes on, so does its run in each tracker, as far as the program can; `trackers.json` in the
run directory remembers which that is. Steps that run again after a kill are taken back where the program can do that,
and are not written a second time where it cannot.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tunesmith.contracts.event_log import EVENTS, read_events
from tunesmith.contracts.events import Evaluated, Event, Finished, Observer, Sampled, Started, Stepped, Warned
from tunesmith.contracts.files import replace_text
from tunesmith.contracts.visible import one_line
from tunesmith.settings.secrets import without_secrets
from tunesmith.training.tracker_rows import TRACKERS, Ending, Opened, Place, Tracker, Value

STATE = "trackers.json"
"""The name of the file in a run directory."""

_ENDINGS: dict[str, Ending] = {"interrupted": "interrupted", "non-finite": "failed"}


@dataclass(frozen=True, slots=True)
class _Run:
    """The run of one tracker: its name there, the last step that it had of each kind of event when it was opened, and
    the last one that it got before it was switched off."""

    run: str
    has: Mapping[str, int]
    stopped: int | None = None


@dataclass(frozen=True, slots=True)
class _Active:
    """A tracker that takes values, and the last step that it has of each kind of event already."""

    row: Tracker
    tracker: Any
    has: Mapping[str, int]


class Trackers:
    """Observer that writes the figures of a run to trackers, and a context that opens and ends its runs there.

    Args:
        names: rows of `TRACKERS`.
        folder: the run directory. Make this observer before the event log, which drops the events of steps that
            run again; put it after the log.
        project: what runs are grouped under.
        name: what the run is called.
        config: the settings, by dotted names, without secrets.
        step: steps that are complete; above 0 the run goes on.
        tokens: what it has trained on in them.
        observers: those of the trainer; all others hear of a tracker that fails.
        say: takes a line for each tracker that was opened.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        *,
        project: str,
        name: str,
        config: Mapping[str, Value],
        step: int,
        tokens: int,
        observers: Sequence[Observer],
        say: Callable[[str], None],
    ) -> None:
        self._names, self._folder, self._project, self._name = names, folder, project, name
        self._config, self._step, self._tokens = config, step, tokens
        self._observers, self._say = observers, say
        self._earlier = _earlier_runs(folder) if names and step else {}
        self._runs: dict[str, _Run] = {}
        self._active: dict[str, _Active] = {}
        self._early: list[Warned] = []  # before anyone listens
        self._ending: Ending = "failed"
        self._sampled = (-1, 0)

    def __enter__(self) -> Trackers:
        """Open the trackers; one that cannot be opened becomes a warning when training starts."""
        if not self._names:
            return self
        from accelerate import PartialState

        PartialState()  # which process this is: Accelerate's trackers and their logger ask for it
        for name in self._names:
            earlier = self._earlier.get(name)
            try:
                with _quiet():
                    opened = self._open(TRACKERS[name], earlier)
            except Exception as error:  # whatever a foreign program raises
                what = f"could not be opened ({_reason(error)}); the run goes on without it"
                self._early.append(self._warning(name, self._step, what))
                if earlier is not None:
                    self._runs[name] = replace(earlier, stopped=self._step)
                continue
            has = earlier.has if earlier else {}
            if TRACKERS[name].rewinds:  # figures; texts it keeps
                has = {kind: step for kind, step in has.items() if kind == Sampled.kind}
            self._active[name] = _Active(TRACKERS[name], opened.tracker, has)
            self._runs[name] = _Run(opened.run, has)
            self._say(f"{name}: {opened.where}")
        self._remember()
        return self

    def _open(self, row: Tracker, earlier: _Run | None) -> Opened:
        opened = row.open(
            Place(
                folder=self._folder,
                project=self._project,
                name=self._name,
                run=earlier.run if earlier else None,
                first_step=self._step + 1 if earlier else 0,
            )
        )
        if earlier is None or row.configure_again:
            row.configure(opened.tracker, self._config)
        return opened

    def __exit__(self, *_: object) -> None:
        """End the runs; one that has heard of no end has failed."""
        for name, active in self._active.items():
            try:
                with _quiet():
                    active.row.close(active.tracker, self._ending)
            except Exception as error:  # whatever a foreign program raises
                self._tell(self._warning(name, self._step, f"could not end its run ({_reason(error)})"))
        self._active.clear()

    def on_event(self, event: Event) -> None:
        """Write what the event says; its kind decides whether it says anything to a tracker."""
        self._step = event.step
        if isinstance(event, Started):
            for warning in self._early:
                self._tell(warning)
        elif isinstance(event, Finished):
            self._ending = _ENDINGS.get(event.reason, "complete")
        elif isinstance(event, Sampled):
            step, count = self._sampled
            count = count + 1 if step == event.step else 1
            self._sampled = (event.step, count)
            text = f"{event.prompt}\n\n{event.answer}"
            self._each(event, lambda row, tracker: row.text(tracker, f"samples/{count}", text, event.step))
        elif values := self._values(event):
            self._each(event, lambda _, tracker: tracker.log(values, step=event.step))

    # ---------------------------------------------------------------- what is written

    def _values(self, event: Event) -> dict[str, float]:
        if isinstance(event, Evaluated):
            sources = {
                f"eval/{metric_name(without_secrets(name))}": loss for name, loss in event.by_source.items()
            }
            return {**sources, "eval/loss": event.loss}
        if isinstance(event, Stepped):
            self._tokens += event.tokens
            return {
                "train/loss": event.loss,
                "train/grad_norm": event.grad_norm,
                "train/learning_rate": event.learning_rate,
                "train/tokens_per_second": event.tokens_per_second,
                "train/memory_gib": event.memory_gib,
                "train/epoch": event.epoch,
                "train/tokens": self._tokens,
            }
        return {}

    def _each(self, event: Event, write: Callable[[Tracker, Any], None]) -> None:
        for name, active in [*self._active.items()]:
            if event.step <= active.has.get(event.kind, -1):
                continue
            try:
                write(active.row, active.tracker)
            except Exception as error:  # whatever a foreign program raises
                self._switch_off(name, event.step, _reason(error))

    # ---------------------------------------------------------------- giving up

    def _switch_off(self, name: str, step: int, reason: str) -> None:
        active = self._active.pop(name)
        with contextlib.suppress(Exception), _quiet():  # it has failed already
            active.row.close(active.tracker, "failed")
        self._runs[name] = replace(self._runs[name], stopped=step - 1)
        self._remember()
        self._tell(
            self._warning(
                name, step, f"failed at step {step} ({reason}) and is switched off; the run goes on"
            )
        )

    def _warning(self, name: str, step: int, what: str) -> Warned:
        return Warned(step=step, message=f"output.track: {name} {what}.")

    def _tell(self, warning: Warned) -> None:
        for observer in self._observers:
            if observer is not self:
                observer.on_event(warning)

    def _remember(self) -> None:
        state = {name: asdict(run) for name, run in self._runs.items()}
        with contextlib.suppress(OSError):  # a full disk is for the checkpoints to report
            replace_text(self._folder / STATE, json.dumps(state, indent=2) + "\n")


def metric_name(text: str) -> str:
    """The text as a part of a metric's name: what all programs take, in the form of a relative path."""
    parts = re.sub(r"[^\w\-. /]", "_", text.replace("\\", "/")).split("/")
    return posixpath.join("", *(part for part in parts if part not in ("", ".", ".."))) or "source"


def _earlier_runs(folder: Path) -> dict[str, _Run]:
    """What each tracker has of the earlier parts of a run; nothing where that cannot be read: new runs begin then.

    It has what it had when it was opened, and since then what the event log has, up to where it was switched off.
    """
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        runs = {name: _Run(entry["run"], entry["has"], entry["stopped"]) for name, entry in state.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # missing, cut off, or edited
        return {}
    written = {event["event"]: event["step"] for event in read_events(folder / EVENTS)}
    for name, run in runs.items():
        most = math.inf if run.stopped is None else run.stopped
        since = {kind: int(min(step, most)) for kind, step in written.items()}
        has = {kind: max(run.has.get(kind, -1), since.get(kind, -1)) for kind in {*run.has, *since}}
        runs[name] = _Run(run.run, has)
    return runs


def _reason(error: Exception) -> str:
    text = one_line(without_secrets(str(error)), 200).rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the greetings of the programs; what a person needs of them is in `Opened.where` and in warnings."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
