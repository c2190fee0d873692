"""The picture of a plan as a file: a PNG, or a page with its figures that opens without network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tunesmith.cli.plan_picture import COLORS, draw_png, layers_of, memory_svg
from tunesmith.cli.plan_words import (
    ALTERNATIVE_HEADS,
    NOTHING_NEAR,
    alternative_rows,
    gib,
    model_lines,
    parts_of,
    plan_lines,
    span,
    verdict,
)
from tunesmith.config.plan_run import PlannedRun
from tunesmith.contracts.errors import UserError
from tunesmith.contracts.files import replace_text
from tunesmith.export.page import escape, names_and_values, page, tiles
from tunesmith.export.plot import check_matplotlib
from tunesmith.planning.plan import Alternative, Plan

_ENDINGS = (".png", ".html")


def check_picture(file: str) -> None:
    """Refuse a picture that could not be drawn, before anything is planned.

    Raises:
        UserError: its ending says no kind of picture, its folder is not there, or matplotlib is not installed.
    """
    ending = Path(file).suffix.lower()
    if ending not in _ENDINGS:
        raise UserError(
            f"--picture {file}: a picture is a PNG or an HTML page.",
            hint="Name a file such as plan.png or plan.html.",
        )
    folder = Path(file).expanduser().parent
    if not folder.is_dir():
        raise UserError(f"--picture {file}: there is no folder {folder}.", hint="Make it, or name another.")
    if ending == ".png":
        check_matplotlib("name a file that ends in .html")


def draw_picture(run: PlannedRun, why_card: str, file: Path) -> None:
    """Write the picture; `check_picture` has seen its name.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        if file.suffix.lower() == ".png":
            draw_png(run, file)
        else:
            replace_text(file, _page(run, why_card))
    except OSError as error:
        raise UserError(
            f"--picture {file} cannot be written: {error.strerror or error}.",
            hint="Name a file in a folder that is there.",
        ) from None


def _page(run: PlannedRun, why_card: str) -> str:
    plan = run.plan
    figures = {
        "GiB at the peak": f"{gib(plan.peak_bytes)} of {gib(plan.budget_bytes)}",
        "rows of a micro-batch": f"{plan.micro_batch_rows:,}",
        "a step": span(plan.step_seconds),
        "tokens/s": f"{plan.tokens_per_second:,.0f}",
    }
    parts = [
        f"<h1>Plan: {escape(run.facts.name)} on {escape(run.card.name)}</h1>",
        f'<p class="verdict{" clean" if plan.fits else ""}">{escape(verdict(run))}</p>',
        tiles(figures),
        f"<h2>{escape('Memory over one micro-batch')}</h2>",
        f'<figure class="chart">{memory_svg(run)}</figure>',
        _legend(plan),
        "<h2>The run</h2>",
        names_and_values(model_lines(run, why_card) | plan_lines(run)),
        "<h2>Parts, each at its most</h2>",
        names_and_values({name: f"{gib(size)} GiB" for name, size in parts_of(plan)}),
        _table(run, "Nearest settings that fit", plan.nearest),
        "" if plan.fits or plan.nearest else f"<p>{escape(NOTHING_NEAR)}</p>",
        _table(run, "What would change", plan.alternatives),
        *(f'<p class="faint">{escape(note)}</p>' for note in run.notes),
    ]
    return page(f"plan: {run.facts.name}", parts, ("report.css",))


def _legend(plan: Plan) -> str:
    boxes = "".join(f'<i style="background:{COLORS[name]}"></i>{escape(name)}' for name, _ in layers_of(plan))
    return f'<p class="legend faint">{boxes}</p>'


def _table(run: PlannedRun, title: str, alternatives: Sequence[Alternative]) -> str:
    if not alternatives:
        return ""
    kinds = ["" if number < 2 else ' class="number"' for number in range(len(ALTERNATIVE_HEADS))]
    heads = "".join(
        f"<th{kind}>{escape(head)}</th>" for kind, head in zip(kinds, ALTERNATIVE_HEADS, strict=True)
    )
    rows = []
    for (what, *others), settings in alternative_rows(run, alternatives):
        named = escape(what) + (f"<br><code>{escape(settings)}</code>" if settings else "")
        cells = "".join(
            f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds[1:], others, strict=True)
        )
        rows.append(f"<tr><td>{named}</td>{cells}</tr>")
    return f"<h2>{escape(title)}</h2><table><tr>{heads}</tr>{''.join(rows)}</table>"
