"""`tunesmith inspect`: one row at every stop of its way from the file to a pack."""

from __future__ import annotations

import json
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.rule import Rule
from rich.text import Text as Rich

from tunesmith.config.telling import teller
from tunesmith.contracts.errors import DataError
from tunesmith.contracts.plural import counted
from tunesmith.settings.run import RunSettings
from tunesmith.settings.urls import shown

if TYPE_CHECKING:
    from tunesmith.config.prepare_data import PreparedData
    from tunesmith.data.cutting import Fit
    from tunesmith.data.formats import Supervised
    from tunesmith.data.render import Encoded, Rendered, Renderer
    from tunesmith.data.sources import Row

_TRAINED = ("black on green3", "black on pale_green3")
_CONTEXT = ("grey66", "grey46")
_CUT = "strike grey35"
_CLIP = 4_000


def inspect_row(settings: RunSettings, console: Console, *, row: int, source: int) -> None:
    """Print what each stop makes of a row, and the counts of the whole set.

    Args:
        row: number of the row in its source, from 0.
        source: number of the training source, from 0.

    Raises:
        DataError: there is no such row or source, or the data cannot be read.
    """
    if source >= len(settings.data.train):
        raise DataError(f"There is no source {source}: data.train lists {len(settings.data.train)}.")
    with console.status("loading libraries"):
        from tunesmith.config.prepare_data import (
            make_renderer,
            open_settings_source,
            reading_of,
            tokenizer_of,
        )
        from tunesmith.data.chat import RowProblem
        from tunesmith.data.formats import Supervised, Text, convert
        from tunesmith.data.tokenize import find_format
        from tunesmith.training.quiet import quiet_libraries

    quiet_libraries()
    chosen = settings.data.train[source]
    with console.status("reading") as status:
        opened = open_settings_source(chosen, tell=teller(console, status))
        rows, found = find_format(opened, chosen.format, dict(chosen.columns), reading_of(chosen))
        picked = next(islice(rows, row, None), None)
    if picked is None:
        raise DataError(f"{shown(chosen.path)} has no row {row}; rows are counted from 0.")
    with console.status("loading the tokenizer"):
        tokenizer = tokenizer_of(settings)
    renderer = make_renderer(settings, tokenizer)
    _print_record(console, picked)
    if picked.record is None:
        console.print(f"This row is dropped: {picked.problem}", style="red", markup=False)
    else:
        try:
            item = convert(found, picked.record, dict(chosen.columns))
            assert isinstance(item, Supervised), "a format of another kind was accepted"
            _print_item(console, item, found.name)
            for rendered in renderer.documents(item):
                _print_document(console, settings, renderer, rendered)
        except RowProblem as problem:
            console.print(f"This row is dropped: {problem}", style="red", markup=False)
    joined = settings.data.join_texts and found.kind is Text
    _print_place(console, settings, tokenizer, picked, source, joined=joined)


def _print_document(console: Console, settings: RunSettings, renderer: Renderer, rendered: Rendered) -> None:
    """The text and the tokens of a document, and what becomes of it.

    Raises:
        RowProblem: found out on the tokens.
    """
    from tunesmith.config.check_kinds import foreign, legible
    from tunesmith.data.cutting import Fit

    _print_text(console, rendered)
    encoded = renderer.encode([rendered])[0]
    problem = encoded.problem or foreign(rendered, encoded, renderer.tokenizer)
    if problem is not None:
        raise problem
    for note in encoded.notes:
        console.print(f"note: {note}", style="yellow", markup=False)
    limit = settings.train.sequence_length
    fit = Fit(limit, settings.data.overlong, settings.data.overlap, settings.data.join_texts)
    whole = rendered.plain and not fit.truncates(encoded, plain=True)
    shown = len(encoded.ids) if whole else limit
    print_tokens(console, *legible(rendered, encoded, renderer.tokenizer), shown)
    _print_fit(console, encoded, fit, plain=rendered.plain)


def _stop(console: Console, title: str) -> None:
    console.print()
    if len(title) + 4 > console.width:  # a rule would cut it
        console.print(title, markup=False, highlight=False, soft_wrap=True)
    else:
        console.print(Rule(Rich(title), align="left", style="dim"))


def _clipped(text: str) -> str:
    return text if len(text) <= _CLIP else f"{text[:_CLIP]}… ({len(text):,} characters)"


def _print_record(console: Console, row: Row) -> None:
    _stop(console, f"record · {row.where}")
    if row.record is not None:
        console.print(
            _clipped(json.dumps(row.record, indent=2, ensure_ascii=False, default=str)),
            markup=False,
            soft_wrap=True,
        )


def _print_item(console: Console, item: Supervised, name: str) -> None:
    from tunesmith.data.formats import Tokens

    messages = getattr(item, "messages", None)
    if messages is None:
        _stop(console, f"{'tokens' if isinstance(item, Tokens) else 'text'} · format {name}")
        return
    _stop(console, f"conversation · format {name} · {len(messages)} messages")
    for tool in getattr(item, "tools", None) or []:
        function = tool.get("function", tool)
        console.print(f"tool  {function.get('name')}: {function.get('description', '')}", markup=False)
    for message in messages:
        line = Rich(f"{message['role']:<10}", style="bold")
        line.append(_clipped(_content(message)), style="not bold")
        console.print(line)


def _content(message: dict[str, Any]) -> str:
    parts = [str(message.get("content") or "")]
    if message.get("reasoning_content"):
        parts.insert(0, f"[thinks: {message['reasoning_content']}]")
    parts += [
        f"[calls {json.dumps(call.get('function', call), ensure_ascii=False)}]"
        for call in message.get("tool_calls") or []
    ]
    return " ".join(part for part in parts if part)


def _print_text(console: Console, rendered: Rendered) -> None:
    _stop(console, "rendered text")
    if rendered.tokens is not None:
        console.print("none: the row is tokenised already", style="dim")
        return
    console.print(_clipped(rendered.text), markup=False, highlight=False)
    for note in rendered.notes:
        console.print(f"note: {note}", style="yellow", markup=False)


def print_tokens(
    console: Console, rendered: Rendered, encoded: Encoded, limit: int, what: str = "trained on"
) -> None:
    """The tokens in colour; those behind the limit are struck out, and trained on by nobody.

    Args:
        what: what the marked tokens are.
    """
    trained_T = encoded.trained & (np.arange(len(encoded.ids)) < limit)
    _stop(console, f"tokens · {len(encoded.ids)}, of which {int(trained_T.sum())} are {what}")
    line = Rich()
    shown = 0
    for number, ((start, end), is_trained) in enumerate(zip(encoded.offsets, trained_T, strict=True)):
        style = (_TRAINED if is_trained else _CONTEXT)[number % 2] if number < limit else _CUT
        # several tokens may share one character (the bytes of an emoji): it is shown once
        line.append(rendered.text[max(start, shown) : end].replace("\n", "↵\n") or "·", style=style)
        shown = max(shown, end)
    console.print(line, soft_wrap=not console.is_terminal)
    legend = Rich("\n")
    legend.append(f" {what} ", style=_TRAINED[0])
    legend.append("  context only", style=_CONTEXT[0])
    if len(encoded.ids) > limit:
        legend.append("  ")
        legend.append("cut off", style=_CUT)
    console.print(legend)
    if not console.color_system:
        spans = "".join(rendered.text[start:end] + "\n" for start, end in rendered.spans)
        console.print(f"{what}:\n{spans}", markup=False, highlight=False, soft_wrap=True)


def _print_fit(console: Console, encoded: Encoded, fit: Fit, *, plain: bool) -> None:
    """What becomes of a document that is too long, trains nothing, or is joined with others.

    Raises:
        RowProblem: it is dropped.
    """
    from tunesmith.data.chat import RowProblem

    length, limit = len(encoded.ids), fit.sequence_length
    if plain and fit.join_texts:
        console.print(f"joined with the texts beside it into documents of {limit} tokens", style="yellow")
        return
    pieces = fit.documents(encoded, plain=plain)
    if isinstance(pieces, RowProblem):
        raise pieces
    if len(pieces) > 1:
        overlap = (
            f", each with the last {counted(fit.overlap, 'token')} of the one before" if fit.overlap else ""
        )
        console.print(f"split into {len(pieces)} documents of up to {limit} tokens{overlap}", style="yellow")
    elif length > limit:
        console.print(f"cut to {limit} of its {length} tokens (train.sequence_length)", style="yellow")


def _print_place(
    console: Console, settings: RunSettings, tokenizer: Any, row: Row, source: int, *, joined: bool
) -> None:
    from tunesmith.config.prepare_data import batch_plan, prepare_data
    from tunesmith.data.batches import rows_of_epoch, steps_of_epoch

    if settings.data.streaming:
        _stop(console, "place · decided while the stream is read")
        return
    with console.status("preparing the whole set") as status:
        data = prepare_data(settings, tokenizer, tell=teller(console, status))
    document = _document_of(data, row, source, joined=joined)
    if document is None:
        _stop(console, "place · none, the row is dropped")
    elif document in data.held_out_N:
        _stop(console, "place · held out: it measures and does not train")
    else:
        plan = batch_plan(settings)
        rows = rows_of_epoch(data.corpus, data.train_N, plan, 0)
        steps = steps_of_epoch(data.corpus, rows, plan)
        number = next((n for n, documents in enumerate(rows) if document in documents), None)
        if number is None:
            _stop(console, "place · left out of the first epoch by the weight of its source")
        else:
            first = 0
            step = next(n for n, step in enumerate(steps) if (first := first + len(step)) > number)
            unit = "pack" if plan.packing else "row"
            _stop(
                console,
                f"place · {unit} {number + 1} of {len(rows)}, step {step + 1} of {len(steps)} in epoch 1",
            )
            _print_pack(console, data, rows[number], document, plan.sequence_length)
    _print_counts(console, data)


def _document_of(data: PreparedData, row: Row, source: int, *, joined: bool) -> int | None:
    """The first document of a row; of joined texts the one in which it begins."""
    from tunesmith.data.table import TokenTable

    table = data.corpus.sources[source]
    before = sum(len(other) for other in data.corpus.sources[:source])
    if joined:
        assert isinstance(table, TokenTable), "a stream has no places"
        at = np.flatnonzero(table.rows <= row.index)
        return before + int(at[-1]) if at.size else None
    return next((before + i for i in range(len(table)) if table.where(i) == row.where), None)


def _print_pack(
    console: Console, data: PreparedData, documents: tuple[int, ...], document: int, capacity: int
) -> None:
    """The pack as a bar: this row in colour, the others alternately grey, room as dots."""
    width = max(20, min(console.width - 2, 100))
    bar, used = Rich(), 0
    for number, other in enumerate(documents):
        start, used = used, used + int(data.corpus.lengths[other])
        cells = max(1, round(used / capacity * width) - round(start / capacity * width))
        bar.append("█" * cells, style="green3" if other == document else _CONTEXT[number % 2])
    bar.append("·" * max(0, width - round(used / capacity * width)), style="dim")
    console.print(bar)
    console.print(
        f"{counted(len(documents), 'document')}, {used} of {capacity} tokens; this row is the one in green",
        highlight=False,
    )


def _print_counts(console: Console, data: PreparedData) -> None:
    _stop(console, "the whole set")
    for name, report in data.reports:
        share = report.trained_tokens / report.tokens if report.tokens else 0.0
        console.print(
            f"{name}: {counted(report.rows_in, 'row')} read, {report.rows_kept:,} kept, {report.truncated:,} cut; "
            f"{report.tokens:,} tokens, {report.trained_tokens:,} trained on ({share:.0%})",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
        for reason, count in report.dropped.items():
            console.print(f"  dropped {count:,}: {reason}", style="yellow", markup=False)
        for example in report.examples:
            console.print(f"  {example}", style="dim", markup=False, soft_wrap=True)
    console.print(
        f"{counted(len(data.train_N), 'document')} to train on, {len(data.held_out_N):,} held out",
        highlight=False,
    )
