"""Warnings and faults in the report of a run. Torch-free."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from tunesmith.contracts.plural import counted
from tunesmith.contracts.visible import one_line
from tunesmith.export.curves import Events, of_kind
from tunesmith.export.page import escape
from tunesmith.export.run_files import read_json

_MOST, _MOST_ROWS, _MOST_LETTERS = 30, 8, 400


def trouble_html(folder: Path, events: Events) -> str:
    """What a person should know: warnings, each text once, and steps that were not applied."""
    warnings = Counter(str(event.get("message")) for event in of_kind(events, "warning"))
    firsts = {str(event.get("message")): event["step"] for event in reversed(of_kind(events, "warning"))}
    lines = [_warning(text, firsts[text], count) for text, count in warnings.items()]
    try:
        faults = sorted((folder / "faults").glob("step-*.json"))
    except OSError:
        faults = []
    lines += [_fault(read_json(path), path.name) for path in faults[:_MOST]]
    if not lines:
        return ""
    more = len(lines) - _MOST
    note = f'<p class="faint">and {counted(more, "further one")}</p>' if more > 0 else ""
    return f"<h2>Warnings and faults</h2>{''.join(lines[:_MOST])}{note}"


def _warning(text: str, step: int, count: int) -> str:
    times = f", {count:,} times" if count > 1 else ""
    return _box(f"step {step:,}{times}", text)


def _fault(fault: dict[str, Any], name: str) -> str:
    batches = fault.get("micro_batches")
    losses = [batch for batch in (batches if isinstance(batches, list) else []) if isinstance(batch, dict)]
    faulty = [batch for batch in losses if batch.get("loss") in ("nan", "inf", "-inf")] or losses
    places = [batch.get("rows") for batch in faulty]
    rows = [str(row) for part in places if isinstance(part, list) for row in part]
    more = f" and {len(rows) - _MOST_ROWS:,} more" if len(rows) > _MOST_ROWS else ""
    said = f"The {fault.get('not_finite', 'step')} is not finite. Rows: {', '.join(rows[:_MOST_ROWS])}{more}"
    return _box(f"faults/{name}", said)


def _box(title: str, text: str) -> str:
    said = escape(one_line(text, _MOST_LETTERS))
    return f'<div class="say warning"><h4>{escape(title)}</h4><p>{said}</p></div>'
