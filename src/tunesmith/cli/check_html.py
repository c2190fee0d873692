"""The report of `tunesmith data check` as one HTML file with pictures, to be kept, mailed and opened anywhere.

It loads nothing and runs nothing: a policy in its head forbids both, and every word of the data is escaped. Rejected:
a plotting library. It is a dependency, and its pictures are not text that can be searched.
"""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

from tunesmith.cli.check_text import REMEDIES, by_count, facts, overlap_lines, verdict
from tunesmith.cli.pictures import bars, escape, histogram
from tunesmith.contracts.plural import counted

if TYPE_CHECKING:
    from tunesmith.config.check_report import DataCheck, Findings, RunCheck, Shown

MOST_TOKENS, _MOST_LETTERS = 1500, 400
"""Tokens of a row, and letters of an example, that are shown."""


def _style() -> str:
    return (files("tunesmith.cli") / "report.css").read_text(encoding="utf-8")


def report_html(run: RunCheck) -> str:
    """The whole page."""
    state = "verdict clean" if run.clean else "verdict"
    said = "".join(f"<p>{escape(line)}</p>" for line in verdict(run))
    several = len(run.checks) > 1 or run.title != run.train[0].path
    parts = [
        f"<h1>{escape(run.title)}</h1>",
        '<p class="faint">What it would train on, as tunesmith data check found it.</p>',
        f'<div class="{state}">{said}</div>',
        _sources(run) if several else "",
        *(_source(check, title=_title(run, check) if several else "") for check in run.checks),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(run.title)} · data check</title>\n<style>{_style()}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def _title(run: RunCheck, check: DataCheck) -> str:
    held = any(check is each for each in run.held_out)
    return f"{check.path} · {'held out' if held else 'training'}"


def _sources(run: RunCheck) -> str:
    """Tokens of each source beside each other, and what sources have in common."""
    rows = [
        (
            _title(run, check),
            (("trained", check.trained_tokens), ("context", check.tokens - check.trained_tokens)),
            counted(check.tokens, "token"),
        )
        for check in run.checks
    ]
    shared: Findings = (
        {"rows that an earlier training source has, too": run.repeated} if run.repeated.count else {}
    )
    if run.overlap is not None:
        shared |= overlap_lines(run.overlap)
    none = '<p class="faint">No row of one is in another.</p>' if run.overlap is not None else ""
    return (
        f"<h2>The sources</h2>{bars(rows)}{_legend(('trained', 'trains'), ('context', 'is context'))}"
        f"<h3>In common</h3>{_findings(shared) or none}"
    )


def _legend(*entries: tuple[str, str]) -> str:
    boxes = "".join(f'<i class="{kind}"></i>{escape(word)}' for kind, word in entries)
    return f'<p class="legend faint">{boxes}</p>'


def _source(check: DataCheck, *, title: str) -> str:
    head = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts(check).items())
    found = "".join(_section(name, findings) for name, findings in (
        ("Dropped", check.dropped), ("Changed", check.changed), ("Remarks", check.remarks)))  # fmt: skip
    shown = "".join(_shown(each) for each in check.examples)
    word = "is the answer" if check.instead else "trains"
    key = '<p class="faint"><mark style="background:var(--mark);color:inherit">What stands on green</mark> '
    masks = f"<h3>Rows and their masks</h3>{key}{word}; the rest is context.</p>{shown}" if shown else ""
    lengths = histogram(check.lengths, check.sequence_length)
    return "".join(
        (
            f"<h2>{escape(title)}</h2>" if title else "",
            _tiles(check),
            f"<dl>{head}</dl>",
            f"<h3>What becomes of the rows</h3>{_fates(check)}",
            f"<h3>Lengths</h3>{lengths}" if lengths else "",
            found,
            masks,
        )
    )


def _tiles(check: DataCheck) -> str:
    share = check.trained_tokens / check.tokens if check.tokens else 0.0
    verb = "are of answers" if check.instead else "train"
    tiles = {
        "rows read": f"{check.rows_in:,}",
        f"of {check.tokens:,} tokens {verb}": f"{share:.0%}",
        **{name: f"{count:,}" for name, count in check.findings().items()},
    }
    return '<div class="tiles">' + "".join(
        f"<div><b>{escape(value)}</b>{escape(name)}</div>" for name, value in tiles.items()
    ) + "</div>"  # fmt: skip


def _fates(check: DataCheck) -> str:
    """Rows that train, that train changed, and those dropped by each reason."""
    total = max(1, check.rows_in)

    def said(count: int) -> str:
        return f"{count:,} ({count / total:.1%})"

    as_is = check.rows_kept - check.rows_changed
    rows = [
        ("kept as they stand", (("kept", as_is),), said(as_is)),
        ("kept, changed", (("changed", check.rows_changed),), said(check.rows_changed)),
        *(
            (f"dropped: {name}", (("dropped", found.count),), said(found.count))
            for name, found in by_count(check.dropped)
        ),
    ]
    return bars([row for row in rows if row[1][0][1]])


def _section(title: str, findings: Findings) -> str:
    return f"<h3>{title}</h3>{_findings(findings)}" if findings else ""


def _findings(findings: Findings) -> str:
    parts = []
    for name, found in by_count(findings):
        lines = [_cut(example) for example in found.examples]
        if name in REMEDIES:
            lines.append(f"To mend it: {REMEDIES[name]}")
        examples = "".join(f"<li>{escape(line)}</li>" for line in lines)
        parts.append(
            f'<details><summary><span class="count">{found.count:,}</span>{escape(name)}</summary>'
            f"<ul>{examples}</ul></details>"
        )
    return "".join(parts)


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MOST_LETTERS else f"{line[: _MOST_LETTERS - 1]}…"


def _shown(shown: Shown) -> str:
    from tunesmith.config.check_report import runs

    count = len(shown.encoded.ids)
    limit = min(shown.limit, MOST_TOKENS)
    text = "".join(
        f"<mark>{escape(piece)}</mark>" if trained else escape(piece) for trained, piece in runs(shown, limit)
    )
    cut = f", of which the first {limit:,} are shown" if count > limit else ""
    return f'<p class="faint">{escape(shown.where)} · {counted(count, "token")}{cut}</p><pre>{text}</pre>'
