"""The report of `tunesmith data check` as one HTML file with pictures, to be kept, mailed and opened anywhere.

It loads nothing and runs nothing: a policy in its head forbids both, and every word of the data is escaped. Rejected:
a plotting library. It is a dependency, and its pictures are not text that can be searched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.cli.check_text import REMEDIES, by_count, facts, overlap_lines, verdict
from tunesmith.cli.pictures import histogram
from tunesmith.contracts.plural import counted
from tunesmith.contracts.visible import one_line
from tunesmith.export.page import bars, escape, legend, marked, names_and_values, page, tiles

if TYPE_CHECKING:
    from tunesmith.config.check_report import DataCheck, Findings, RunCheck, Shown

MOST_TOKENS, _MOST_LETTERS = 1500, 400
"""Tokens of a row, and letters of an example, that are shown."""


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
    return page(f"{run.title} · data check", parts)


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
        f"<h2>The sources</h2>{bars(rows)}{legend(('trained', 'trains'), ('context', 'is context'))}"
        f"<h3>In common</h3>{_findings(shared) or none}"
    )


def _source(check: DataCheck, *, title: str) -> str:
    found = "".join(_section(name, findings) for name, findings in (
        ("Dropped", check.dropped), ("Changed", check.changed), ("Remarks", check.remarks)))  # fmt: skip
    shown = "".join(_shown(each) for each in check.examples)
    word = "is the answer" if check.instead else "trains"
    key = '<p class="faint"><mark>What stands on green</mark> '
    masks = f"<h3>Rows and their masks</h3>{key}{word}; the rest is context.</p>{shown}" if shown else ""
    lengths = histogram(check.lengths, check.sequence_length)
    return "".join(
        (
            f"<h2>{escape(title)}</h2>" if title else "",
            _tiles(check),
            names_and_values(facts(check)),
            f"<h3>What becomes of the rows</h3>{_fates(check)}",
            f"<h3>Lengths</h3>{lengths}" if lengths else "",
            found,
            masks,
        )
    )


def _tiles(check: DataCheck) -> str:
    share = check.trained_tokens / check.tokens if check.tokens else 0.0
    verb = "are of answers" if check.instead else "train"
    shown = {
        "rows read": f"{check.rows_in:,}",
        f"of {check.tokens:,} tokens {verb}": f"{share:.0%}",
        **{name: f"{count:,}" for name, count in check.findings().items()},
    }
    return tiles(shown)


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
        lines = [one_line(example, _MOST_LETTERS) for example in found.examples]
        if name in REMEDIES:
            lines.append(f"To mend it: {REMEDIES[name]}")
        examples = "".join(f"<li>{escape(line)}</li>" for line in lines)
        parts.append(
            f'<details><summary><span class="count">{found.count:,}</span>{escape(name)}</summary>'
            f"<ul>{examples}</ul></details>"
        )
    return "".join(parts)


def _shown(shown: Shown) -> str:
    from tunesmith.config.check_report import runs

    count = len(shown.encoded.ids)
    limit = min(shown.limit, MOST_TOKENS)
    cut = f", of which the first {limit:,} are shown" if count > limit else ""
    return f'<p class="faint">{escape(shown.where)} · {counted(count, "token")}{cut}</p>{marked(runs(shown, limit))}'
