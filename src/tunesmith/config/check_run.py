"""Wires `tunesmith data check` for several sources: those of a run file, or a set and what is held out beside it.

Each source is checked as `check_data` does it; then rows are compared across sources by hashes of their tokens. A
held-out row that a training row equals measures memory, and so nearly does one with the same prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.config.check_data import Plan, check_source
from tunesmith.config.check_report import EXAMPLES, DataCheck, Finding, Marks, Overlap, RunCheck
from tunesmith.config.prepare_data import make_renderer, names_of, open_settings_source, reading_of
from tunesmith.data.batches import hold_out
from tunesmith.data.cutting import Fit
from tunesmith.data.remote import Tell
from tunesmith.settings.data import HeldOutSettings, SourceSettings
from tunesmith.settings.run import RunSettings

Progress = Callable[[str, int], None]
"""Called with a source's name and the number of its rows that are done."""

_Named = tuple[str, Marks]


def check_run(
    settings: RunSettings,
    tokenizer: Any,
    title: str,
    *,
    most_rows: int | None = None,
    progress: Progress | None = None,
    tell: Tell | None = None,
) -> RunCheck:
    """Check the data of a run with its settings: every source, and what sources have in common.

    Args:
        tokenizer: the model's.
        title: name of the run file.
        most_rows: read only the first rows of each source.
        progress: called with a source's name and the number of its rows done.
        tell: gets lines about downloads from addresses.

    Raises:
        DataError: a source, its format or the template cannot be understood.
    """
    data = settings.data
    renderer = make_renderer(settings, tokenizer)
    fit = Fit(settings.train.sequence_length, data.overlong, data.overlap, data.join_texts)

    def check(source: SourceSettings, name: str) -> DataCheck:
        found = DataCheck(name, settings.model.name, data.template, settings.train.sequence_length)
        plan = Plan(source.format, dict(source.columns), reading_of(source), fit)
        report = None if progress is None else lambda rows: progress(name, rows)
        opened = open_settings_source(source, streaming=data.streaming, tell=tell)
        return check_source(opened, found, renderer, plan, most_rows, report)

    held = () if isinstance(data.eval, HeldOutSettings) else data.eval
    train, held_out = (list(map(check, sources, names_of(sources))) for sources in (data.train, held))
    run = RunCheck(title, train, held_out)
    if (
        isinstance(data.eval, HeldOutSettings)
        and data.eval.fraction
        and not data.join_texts
        and not any(each.partial for each in run.train)
    ):
        run.overlap = _within(run.train, data.eval, settings.train.seed)
    run.refuses = next(
        (f"data.{name}: error" for name in ("overlong", "malformed") if getattr(data, name) == "error"), ""
    )
    return compared(run)


def compared(run: RunCheck) -> RunCheck:
    """The same, with what its sources have in common; the numbers of rows name them."""
    train, held = ([(check.path, check.marks) for check in checks] for checks in (run.train, run.held_out))
    if held:
        run.overlap = overlap_of(train, held)
    for number in range(1, len(train)):
        _repeats(train[number], train[:number], run.repeated)
    return run


def overlap_of(train: Sequence[_Named], held: Sequence[_Named]) -> Overlap:
    """Held-out rows that equal a training row, and those that answer the same prompt."""
    found = Overlap()
    for name, marks in held:
        found.held_out += len(marks.rows)
        same_N = _repeats((name, marks), train, found.same)
        rest = Marks(marks.rows[~same_N], marks.digests[~same_N], marks.prompts[~same_N])
        _repeats((name, rest), train, found.same_prompt, by="prompts")
    return found


def _within(checks: Sequence[DataCheck], held: HeldOutSettings, seed: int) -> Overlap:
    """The overlap where a share of the training rows measures."""
    counts = [len(check.marks.rows) for check in checks]
    held_N = hold_out(sum(counts), held.fraction, held.max_rows, seed)
    train: list[_Named] = []
    measured: list[_Named] = []
    for check, own_N in zip(checks, np.split(held_N, np.cumsum(counts)[:-1]), strict=True):
        for kept_N, out in ((~own_N, train), (own_N, measured)):
            marks = check.marks
            out.append((check.path, Marks(marks.rows[kept_N], marks.digests[kept_N], marks.prompts[kept_N])))
    return overlap_of(train, measured)


def _repeats(
    own: _Named, others: Sequence[_Named], finding: Finding, *, by: str = "digests"
) -> NDArray[np.bool_]:
    """Which rows of a source are in one of the others, too; counted, and the first of them named."""
    name, marks = own
    keys_N: NDArray[np.uint64] = getattr(marks, by)
    repeated_N = np.zeros(len(keys_N), dtype=np.bool_)
    for other, theirs in others:
        known: NDArray[np.uint64] = getattr(theirs, by)
        new_N = np.isin(keys_N, known) & ~repeated_N & ((keys_N != 0) | (by == "digests"))
        for number in np.flatnonzero(new_N)[: max(0, EXAMPLES - len(finding.examples))]:
            twin = theirs.rows[int(np.argmax(known == keys_N[number]))]
            finding.add(f"row {marks.rows[number]} of {name}", f"as row {twin} of {other}")
            finding.count -= 1
        repeated_N |= new_N
    finding.count += int(np.count_nonzero(repeated_N))
    return repeated_N
