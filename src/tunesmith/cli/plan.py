"""`tunesmith plan`: what a run takes of a card's memory and how fast it is, before anything is loaded."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tunesmith.cli.plan_page import check_picture, draw_picture
from tunesmith.cli.plan_words import (
    ALTERNATIVE_HEADS,
    NOTHING_NEAR,
    alternative_rows,
    gib,
    model_lines,
    parts_of,
    plan_lines,
    verdict,
)
from tunesmith.config.load import load_settings
from tunesmith.config.plan_card import choose_card
from tunesmith.config.plan_run import PlannedRun, plan_run
from tunesmith.contracts.errors import UserError
from tunesmith.planning.facts import trained_parameters
from tunesmith.planning.plan import Alternative
from tunesmith.settings.quantities import bytes_of

_BAR = 40
_NAME = 12
"""Columns of a line's name."""
_LEAST_NAME = 18
"""Columns that the name of a choice has on a narrow terminal."""


def plan_and_print(
    run_file: str,
    overrides: Sequence[str],
    console: Console,
    *,
    gpu: str | None = None,
    host_memory: str | None = None,
    as_json: bool = False,
    picture: str | None = None,
) -> bool:
    """Plan a run and print the plan; whether it fits.

    Args:
        run_file: the run; overrides: settings that replace some of it.
        console: where the table goes.
        gpu: the card to plan for; None is this machine's.
        host_memory: what its machine has free, such as `64 GiB`; None is this machine's, or twice the card's memory.
        as_json: print one JSON object instead of the table.
        picture: a file for the picture of the memory over one step, PNG or HTML by its ending.

    Raises:
        UserError: the run file or the size is wrong, the model's config is nowhere, or the picture cannot be drawn.
    """
    if picture is not None:
        check_picture(picture)
    settings = load_settings(run_file, overrides)
    chosen = choose_card(gpu, None if host_memory is None else _free(host_memory))
    run = plan_run(settings, chosen.card, chosen.host_bytes, host_known=chosen.host_known)
    if as_json:
        print(json.dumps(as_object(run), indent=2))
    else:
        _print(run, run_file, chosen.why, console)
    if picture is not None:
        draw_picture(run, chosen.why, Path(picture).expanduser())
        if not as_json:
            console.print(f"\n{picture}", markup=False, highlight=False, soft_wrap=True)
    return run.plan.fits


def _free(host_memory: str) -> int:
    size = bytes_of(host_memory)
    if size is None:
        raise UserError(
            f"--host-memory {host_memory!r} is no size.",
            hint="Write one such as 64GiB, in MiB, GiB, TiB or GB.",
        )
    return size


def as_object(run: PlannedRun) -> dict[str, Any]:
    """The plan and what it was made of, for programs: bytes and seconds."""
    facts, plan = run.facts, run.plan
    return {
        "model": {
            "name": facts.name,
            "model_type": facts.model_type,
            "parameters": facts.parameters,
            "trained_parameters": trained_parameters(facts, run.request.work),
            "layers": len(facts.layers),
            "config_from": run.config_from,
            "unfused": facts.unfused or None,
        },
        "card": {
            "name": run.card.name,
            "memory_bytes": run.card.memory_bytes,
            "figures_from": run.card.source,
            "estimated": run.card.estimated,
            "computes_in": run.computes,
        },
        "request": asdict(run.request),
        "plan": asdict(plan),
        "seconds_of_1000_steps": 1000 * plan.step_seconds,
        "notes": list(run.notes),
    }


def _print(run: PlannedRun, run_file: str, why_card: str, console: Console) -> None:
    plan = run.plan
    console.print(Text(run_file, "bold underline"), soft_wrap=True)
    _print_lines(console, model_lines(run, why_card))
    console.print(Text("\nmemory in GiB, each part at its most", "bold"))
    largest = max((size for _, size in parts_of(plan)), default=1)
    for name, size in parts_of(plan):
        line = Text(f"  {name:<{_NAME}}{gib(size):>8}")
        if bar := "█" * round(_BAR * size / largest):
            line.append(f"  {bar}", "green3" if plan.fits else "yellow")
        console.print(line, soft_wrap=True)
    console.print()
    _print_lines(console, plan_lines(run))
    one_line = not console.is_terminal
    console.print(Text(f"\n{verdict(run)}", "bold green" if plan.fits else "bold red"), soft_wrap=one_line)
    _print_alternatives(console, "nearest settings that fit", run, plan.nearest)
    if not plan.fits and not plan.nearest:
        console.print(Text(NOTHING_NEAR), soft_wrap=one_line)
    _print_alternatives(console, "what would change", run, plan.alternatives)
    if run.notes:
        console.print()
    for note in run.notes:
        console.print(Text(f"note: {note}", "dim"), soft_wrap=one_line)


def _print_lines(console: Console, lines: Mapping[str, str]) -> None:
    """Names with a value each: aligned on a terminal, one line each elsewhere."""
    if not console.is_terminal:
        for name, text in lines.items():
            console.print(Text(f"{name:<{_NAME}} {text}"), soft_wrap=True)
        return
    table = Table.grid(padding=(0, 1))
    table.add_column(min_width=_NAME, no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in lines.items():
        table.add_row(Text(name, "bold"), Text(text))
    console.print(table)


def _print_alternatives(
    console: Console, title: str, run: PlannedRun, alternatives: Sequence[Alternative]
) -> None:
    """What each comes to, in columns; below it the settings to write, on a line that can be copied."""
    if not alternatives:
        return
    rows = list(alternative_rows(run, alternatives))
    table = [(title, *ALTERNATIVE_HEADS[1:]), *(cells for cells, _ in rows)]
    first, *widths = (max(len(row[column]) for row in table) for column in range(len(ALTERNATIVE_HEADS)))
    if console.is_terminal:  # where names are too long they go on in the next line
        first = min(first, max(_LEAST_NAME, console.width - sum(width + 2 for width in widths)))
    console.print()
    for number, (cells, settings) in enumerate([(table[0], ""), *rows]):
        name, *more = textwrap.wrap(cells[0], first)
        line = Text(f"{name:<{first}}", "bold" if number == 0 else "")
        for cell, width in zip(cells[1:], widths, strict=True):
            line.append(f"  {cell:>{width}}", "dim" if number == 0 else "not bold")
        console.print(line, soft_wrap=True)
        for rest in more:
            console.print(Text(rest, "bold" if number == 0 else ""), soft_wrap=True)
        if settings:
            console.print(Text(f"  {settings}", "dim"), soft_wrap=True)
