"""The data of a run in its report: what became of the rows, and some of them with their masks. Torch-free."""

from __future__ import annotations

from typing import Any

from tunesmith.contracts.plural import counted
from tunesmith.contracts.visible import one_line
from tunesmith.export.page import bars, escape, legend, marked

_MOST_EXAMPLES, _MOST_LETTERS, _MOST_SOURCES, _MOST_REASONS = 8, 300, 50, 20


def _count(values: dict[str, Any], name: str) -> int:
    value = values.get(name)
    return value if isinstance(value, int) and value >= 0 else 0


def _objects(value: Any) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _texts(value: Any) -> list[str]:
    return [str(entry) for entry in value] if isinstance(value, list) else []


def data_html(data: dict[str, Any]) -> str:
    """Rows of each source: what trains, what was dropped and why; and the tokens of all sources beside each other.

    Args:
        data: what `data.json` of a run directory holds.
    """
    sources = _objects(data.get("sources"))
    if not sources:
        return ""
    documents = data.get("documents")
    totals = documents if isinstance(documents, dict) else {}
    train, held_out = _count(totals, "train"), _count(totals, "held_out")
    said = [f"documents that train: {train:,}" if train else "streamed"]
    said += [f"that are held out and measure: {held_out:,}"] if held_out else []
    shown = "".join(_source(source) for source in sources[:_MOST_SOURCES])
    more = len(sources) - _MOST_SOURCES
    note = f'<p class="faint">and {counted(more, "further source")}</p>' if more > 0 else ""
    return (
        f'<h2>Data</h2><p class="faint">{"; ".join(said)}</p>{_tokens(sources[:_MOST_SOURCES])}{shown}{note}'
    )


def _name(source: dict[str, Any]) -> str:
    return f"{source.get('name')}{' · held out' if source.get('role') == 'held out' else ''}"


def _report(source: dict[str, Any]) -> dict[str, Any]:
    report = source.get("report")
    return report if isinstance(report, dict) else {}


def _tokens(sources: list[dict[str, Any]]) -> str:
    rows = []
    for source in sources:
        report = _report(source)
        tokens, trained = _count(report, "tokens"), _count(report, "trained_tokens")
        share = f", {trained / tokens:.0%} trained on" if tokens else ""
        parts = (("trained", trained), ("context", max(0, tokens - trained)))
        rows.append((_name(source), parts, f"{counted(tokens, 'token')}{share}"))
    return bars(rows) + legend(("trained", "trained on"), ("context", "context"))


def _source(source: dict[str, Any]) -> str:
    report = _report(source)
    total, kept, cut = (_count(report, name) for name in ("rows_in", "rows_kept", "truncated"))
    whole = max(1, total)
    dropped = report.get("dropped")
    reasons = {str(name): count for name, count in (dropped if isinstance(dropped, dict) else {}).items()}

    def said(count: int) -> str:
        return f"{count:,} ({count / whole:.1%})"

    verb = "measure" if source.get("role") == "held out" else "train"
    rows = [(f"{verb} as they stand", (("kept", kept - cut),), said(kept - cut))]
    rows += [(f"{verb}, cut at the sequence length", (("changed", cut),), said(cut))] if cut else []
    for reason, count in sorted(reasons.items(), key=lambda item: -_count(reasons, item[0]))[:_MOST_REASONS]:
        if isinstance(count, int):
            rows.append((f"dropped: {reason}", (("dropped", count),), said(count)))
    examples = _texts(report.get("examples"))[:_MOST_EXAMPLES]
    listed = "".join(f"<li>{escape(one_line(line, _MOST_LETTERS))}</li>" for line in examples)
    remarks = [one_line(note, _MOST_LETTERS) for note in _texts(report.get("notes"))]
    notes = "".join(f'<p class="faint">{escape(note)}</p>' for note in remarks)
    named = f"<details><summary>some of these rows</summary><ul>{listed}</ul></details>" if listed else ""
    return (
        f'<h3>{escape(_name(source))}</h3><p class="faint">{counted(total, "row")} read as '
        f"{escape(report.get('format') or 'unknown')}</p>{bars(rows)}{notes}{named}"
    )


def masks_html(masks: dict[str, Any]) -> str:
    """Some documents with what trains marked.

    Args:
        masks: what `masks.json` of a run directory holds.
    """
    documents = _objects(masks.get("documents"))
    if not documents:
        return ""
    key = '<p class="faint">What stands <mark>on green</mark> trains; the rest is context.</p>'
    return f"<h2>Rows and their masks</h2>{key}{''.join(map(_document, documents))}"


def _document(document: dict[str, Any]) -> str:
    count, shown = _count(document, "tokens"), _count(document, "shown")
    cut = f", of which the first {shown:,} are shown" if count > shown else ""
    trained = f", {_count(document, 'trained'):,} trained on"
    found = document.get("pieces")
    pieces = [
        (piece[0] is True, str(piece[1]))
        for piece in (found if isinstance(found, list) else [])
        if isinstance(piece, list) and len(piece) == 2
    ]
    where = f"{document.get('where')} · {counted(count, 'token')}{trained}{cut}"
    return f'<p class="faint">{escape(where)}</p>{marked(pieces)}'
