"""The report of `tunesmith data check` for a terminal or a pipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text as Rich

from tunesmith.contracts.plural import counted
from tunesmith.contracts.visible import one_line, visible

if TYPE_CHECKING:
    from tunesmith.config.check_report import DataCheck, Finding, Findings, Overlap, RunCheck

_BAR = 40
MOST_TOKENS = 400
"""Of a longer row the first tokens are shown."""
_EXAMPLES, _LINE = 3, 200


def print_check(run: RunCheck, console: Console) -> None:
    """Print everything that was found, source after source, and a last line that sums it up."""
    several = len(run.checks) > 1 or run.title != run.train[0].path
    if run.title != run.train[0].path:
        console.print(Rich(visible(run.title), style="bold"), soft_wrap=True)
    for check in run.checks:
        if several:
            held = any(check is each for each in run.held_out)
            console.print(Rich(f"\n{'held out' if held else 'training'}", style="dim"))
        _print_head(check, console)
        _print_lengths(check, console)
        _print_findings(console, "dropped", check.dropped, "red")
        _print_findings(console, "changed", check.changed, "yellow")
        _print_findings(console, "remarks", check.remarks, "cyan")
        _print_row(check, console)
    if run.repeated.count:
        _print_findings(
            console, "between sources", {"rows that an earlier source has, too": run.repeated}, "cyan"
        )
    if run.overlap is not None:
        _print_findings(console, "held out", overlap_lines(run.overlap), "yellow")
    console.print()
    for line in verdict(run):
        style = "green" if run.clean else "yellow"
        console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)


def _print_head(check: DataCheck, console: Console) -> None:
    lines = facts(check)
    console.print(Rich(visible(check.path), style="bold underline"), soft_wrap=True)
    table = Table.grid(padding=(0, 2))
    for name, text in lines.items():
        if console.is_terminal:
            table.add_row(Rich(name, style="bold"), Rich(visible(text)))
        else:
            console.print(Rich(f"{name:<9}{visible(text)}"), soft_wrap=True)
    if console.is_terminal:
        console.print(table)


def facts(check: DataCheck) -> dict[str, str]:
    """The lines at the head of a report, by name."""
    read = ", ".join(check.columns) or "no column"
    ignored = f"; ignored: {', '.join(check.ignored)}" if check.ignored else ""
    share = check.trained_tokens / check.tokens if check.tokens else 0.0
    verb = "of answers" if check.instead else "trained on"
    first = "the first " if check.partial else ""
    counts = ", ".join(_counted(count, name) for name, count in check.counts.items())
    packing = f"{counted(check.packs, 'pack')} of up to {check.sequence_length:,} tokens"
    noun = "text" if check.kind == "plain text" else "answer"
    lost = f"{counted(check.cut_answers, noun)} cut off at {check.sequence_length:,} tokens"
    lines = {
        "format": f"{check.format}: {check.summary} (from {read}{ignored})",
        "model": f"{check.tokenizer}, template {check.template}",
        "rows": f"{first}{check.rows_in:,} read, {check.rows_kept:,} complete",
        "kind": f"{check.kind}: {counts}" if counts else "",
        "tokens": f"{check.tokens:,}, of which {check.trained_tokens:,} are {verb} ({share:.0%})",
        "cut": f"{lost}, {counted(check.lost_tokens, 'token')} lost" if check.cut_answers else "",
        "packing": f"{packing}, {check.efficiency:.1%} full" if check.packs else "",
        "ranks": _balance(check),
    }
    return {name: text for name, text in lines.items() if text}


def _balance(check: DataCheck) -> str:
    """How even attention is over ranks, for the largest number of them that has a whole step."""
    if not check.imbalance:
        return ""
    ranks, (before, after) = max(check.imbalance.items())
    return f"attention of the dearest of {ranks} over their mean: {before:.2f} dealt in turn, {after:.2f} balanced"


def _counted(count: int, plural: str) -> str:
    one = count == 1 and plural.endswith("s") and not plural.startswith("with ")
    return f"{count:,} {plural.removesuffix('s') if one else plural}"


def _print_lengths(check: DataCheck, console: Console) -> None:
    bins = check.histogram()
    if not bins:
        return
    most = max(rows for _, _, rows in bins)
    console.print(Rich("\ntokens a document", style="bold"))
    for low, high, rows in bins:
        line = Rich(f"{low:>7,} – {high:<7,} ")
        style = "green3" if low <= check.sequence_length else "yellow"
        line.append("█" * (-(-rows * _BAR // most)), style=style)
        line.append(f" {rows:,}")
        console.print(line)


def _print_findings(console: Console, title: str, findings: Findings, style: str) -> None:
    if not findings:
        return
    console.print(Rich(f"\n{title}", style="bold"))
    for name, found in by_count(findings):
        console.print(Rich(f"  {found.count:,} × {visible(name)}", style=style), soft_wrap=True)
        for example in found.examples[:_EXAMPLES]:
            console.print(Rich(f"      {one_line(example, _LINE)}", style="dim"), soft_wrap=True)
        if name in REMEDIES:
            console.print(Rich(f"      {REMEDIES[name]}", style="italic"), soft_wrap=True)


REMEDIES = {
    "prompt is not a prefix": "data.prefix_mismatch: split makes a document of each turn, as a server would show it; "
    "train_on: last trains the last turn only",
}
"""What can be done about a finding, where it is not obvious."""


def by_count(findings: Findings) -> list[tuple[str, Finding]]:
    """Findings, the commonest first."""
    return sorted(findings.items(), key=lambda item: -item[1].count)


def overlap_lines(overlap: Overlap) -> Findings:
    """What held-out rows share with training rows, by what it is."""
    found = {
        "held-out rows that are training rows, too": overlap.same,
        "held-out rows that answer the prompt of a training row": overlap.same_prompt,
    }
    return {name: finding for name, finding in found.items() if finding.count}


def _print_row(check: DataCheck, console: Console) -> None:
    """A row in the colours of `tunesmith inspect`; of a long one the first tokens."""
    from tunesmith.cli.inspect_row import print_tokens
    from tunesmith.data.render import Encoded, Rendered

    if not check.examples:
        return
    shown = check.examples[0]
    rendered, encoded = shown.rendered, shown.encoded
    text, length, title = rendered.text, len(encoded.ids), f"\na row · {shown.where}"
    if length > MOST_TOKENS:
        title += f" · the first {MOST_TOKENS} of its {length:,} tokens"
        first = slice(MOST_TOKENS)
        encoded = Encoded(encoded.ids[first], encoded.trained[first], encoded.offsets[first])
        text = text[: int(encoded.offsets[-1, 1])]
    spans = [(start, min(end, len(text))) for start, end in rendered.spans if start < len(text)]
    console.print(Rich(visible(title), style="bold"), soft_wrap=True)
    what = "of the answer" if check.instead else "trained on"
    print_tokens(console, Rendered(visible(text), spans), encoded, shown.limit, what)


def verdict(run: RunCheck) -> list[str]:
    """What it comes to, in a sentence or two."""
    lines = [
        f"{check.path}: these are {check.kind}. {check.instead}" for check in run.checks if check.instead
    ]
    if len(run.checks) == 1 and lines:
        lines = [f"These are {run.train[0].kind}. {run.train[0].instead}"]
    elif run.clean:
        lines = ["Every row would train as it stands."]
    rows = sum(check.rows_in for check in run.checks)
    dropped = sum(check.rows_dropped for check in run.checks)
    changed = sum(check.rows_changed for check in run.checks)
    if not lines:
        parts = [f"{dropped:,} of {counted(rows, 'row')} would not train"] if dropped else []
        if changed:
            parts.append(f"{changed:,} would train on something else than the file says")
        lines = [f"{'; '.join(parts)}."]
    if dropped and run.refuses:
        lines.append(f"{run.refuses} ends a run at such rows.")
    if run.overlap is not None:
        lines.append(_overlap(run.overlap))
    return lines


def _overlap(overlap: Overlap) -> str:
    """What the comparison of held-out rows came to."""
    counts = {
        "in the training data, too": overlap.same.count,
        "behind a prompt of the training data": overlap.same_prompt.count,
    }
    parts = [f"{count:,} {'is' if count == 1 else 'are'} {what}" for what, count in counts.items() if count]
    of = f"Of {counted(overlap.held_out, 'held-out row')}"
    if not parts:
        return f"{of} none is in the training data."
    return f"{of} {' and '.join(parts)}: there the held-out loss measures memory."
