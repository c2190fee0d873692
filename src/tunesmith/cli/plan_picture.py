"""The memory of a card over one micro-batch of a plan, as SVG and as a PNG.

What is there all the time lies at the bottom; activations rise layer by layer in forward and fall in backward. Each
moment is a stair as high as the most that is there while its layer runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from tunesmith.cli.plan_words import gib
from tunesmith.config.plan_run import PlannedRun
from tunesmith.export.line_chart import round_numbers
from tunesmith.export.page import escape
from tunesmith.export.plot import new_figure, save_figure
from tunesmith.planning.plan import PARTS, Plan

COLORS = {
    "weights": "#4f6d94",
    "unpacked": "#a9bdd4",
    "adapter": "#86a5c9",
    "optimizer": "#dd9a2c",
    "gradients": "#b3541e",
    "reserve": "#c9d0d9",
    "activations": "#3c9a60",
    "workspace": "#8b97a6",
    "head": "#8c6bc0",
}
"""Of each of `PARTS`, in the order in which they lie on each other: what is always there below."""

_GIB = 2**30
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 880, 380, 52, 12, 24, 30
_LABEL = 7
"""Width of a letter of a phase's name; where it has no room it is left out."""


def layers_of(plan: Plan) -> list[tuple[str, list[float]]]:
    """(part, GiB at each moment) of the parts that are there at any, from the bottom to the top."""
    moments = [parts for _, parts in plan.timeline]
    found = [(name, [parts.get(name, 0) / _GIB for parts in moments]) for name in COLORS]
    return [(name, sizes) for name, sizes in found if any(sizes)]


def phases(plan: Plan) -> Iterator[tuple[str, int, int]]:
    """(name, first moment, moment behind the last) of what a step goes through: the first words of its labels."""
    start = 0
    for name, group in groupby(label.partition(" ")[0] for label, _ in plan.timeline):
        count = len(list(group))
        yield name, start, start + count
        start += count


def _title(run: PlannedRun) -> str:
    return f"Memory of {run.card.name} over one micro-batch: {run.facts.name}"


def memory_svg(run: PlannedRun) -> str:
    """Areas on top of each other, the budget as a line, and the figures of a moment where the pointer rests."""
    plan, layers = run.plan, layers_of(run.plan)
    moments = len(plan.timeline)
    top: float = 1.05 * max(plan.budget_bytes, *(sum(parts.values()) for _, parts in plan.timeline)) / _GIB

    def x(moment: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * moment / moments

    def y(size: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * size / top

    drawn = []
    for size in round_numbers(0, top):
        drawn.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(size):.1f}" y2="{y(size):.1f}"/>'
        )
        drawn.append(f'<text class="tall" x="{_LEFT - 7}" y="{y(size) + 4:.1f}">{size:g}</text>')
    below = [0.0] * moments
    for name, sizes in layers:
        above = [low + size for low, size in zip(below, sizes, strict=True)]
        upper = [(x(n + side), y(size)) for n, size in enumerate(above) for side in (0, 1)]
        lower = [(x(n + side), y(size)) for n, size in enumerate(below) for side in (0, 1)]
        edge = [*upper, *reversed(lower)]
        points = " ".join(f"{left:.1f},{high:.1f}" for left, high in edge)
        drawn.append(f'<polygon fill="{COLORS[name]}" points="{points}"/>')
        below = above
    drawn += _limit(plan.budget_bytes, y(plan.budget_bytes / _GIB))
    drawn += _phase_names(plan, x)
    drawn += _spots(plan, x)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(_title(run))}">{"".join(drawn)}'
        f'<text class="unit" style="text-anchor:start" x="4" y="12">GiB</text></svg>'
    )


def _limit(budget: int, high: float) -> Iterator[str]:
    """The budget as a line with its size, each on a ground of paper: where a plan does not fit they lie on areas."""
    ends = f'x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{high:.1f}" y2="{high:.1f}"'
    yield f'<line style="stroke:var(--paper);stroke-width:3" {ends}/><line class="limit" {ends}/>'
    ground = "text-anchor:end;stroke:var(--paper);stroke-width:4px;paint-order:stroke;font-weight:600"
    words = f"{gib(budget)} GiB may be used"
    yield f'<text class="limit" style="{ground}" x="{_WIDTH - _RIGHT}" y="{high - 6:.1f}">{words}</text>'


def _phase_names(plan: Plan, x: Callable[[float], float]) -> Iterator[str]:
    """Names of the phases below the axis, and a line where one begins."""
    bottom = _HEIGHT - _BOTTOM
    yield f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>'
    for name, first, behind in phases(plan):
        left, right = x(first), x(behind)
        yield f'<line class="axis" x1="{left:.1f}" x2="{left:.1f}" y1="{bottom}" y2="{bottom + 7}"/>'
        if right - left >= _LABEL * len(name):
            yield f'<text x="{(left + right) / 2:.1f}" y="{bottom + 20}">{escape(name)}</text>'


def _spots(plan: Plan, x: Callable[[float], float]) -> Iterator[str]:
    """Stripes over the picture that say what is there at a moment, where the pointer rests."""
    wide = x(1) - x(0)
    top, bottom = _TOP, _HEIGHT - _BOTTOM
    for number, (label, parts) in enumerate(plan.timeline):
        values = ", ".join(f"{name} {gib(parts[name])}" for name in PARTS if parts.get(name))
        place = x(number + 0.5)
        yield (
            f'<g class="spot"><rect x="{x(number):.1f}" y="{top}" width="{wide:.1f}" height="{bottom - top}"/>'
            f'<line x1="{place:.1f}" x2="{place:.1f}" y1="{top}" y2="{bottom}"/>'
            f"<title>{escape(label)}: {gib(sum(parts.values()))} GiB ({escape(values)})</title></g>"
        )


# ---------------------------------------------------------------- the PNG


def draw_png(run: PlannedRun, file: Path) -> None:
    """Write the picture by matplotlib, whole or not at all."""
    plan, layers = run.plan, layers_of(run.plan)
    moments = len(plan.timeline)
    figure = new_figure(9, 4.6)
    axes: Any = figure.subplots()
    axes.stackplot(
        range(moments + 1),
        *([*sizes, sizes[-1]] for _, sizes in layers),
        step="post",
        colors=[COLORS[name] for name, _ in layers],
        labels=[name for name, _ in layers],
    )
    budget = plan.budget_bytes / _GIB
    # on a ground of paper: where a plan does not fit they lie on areas
    axes.axhline(budget, color="white", linewidth=3)
    axes.axhline(budget, color="#c03030", linestyle="--", linewidth=1.2)
    axes.annotate(
        f"{gib(plan.budget_bytes)} GiB may be used", (moments, budget), (-3, 4), textcoords="offset points",
        color="#c03030", ha="right", va="bottom", fontsize="small",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
    )  # fmt: skip
    begins = [(first, name) for name, first, behind in phases(plan) if behind - first > 1]
    axes.set_xticks([first for first, _ in begins], [name for _, name in begins], ha="left", fontsize="small")
    axes.set_xlim(0, moments)
    axes.set_ylim(0, 1.07 * max(budget, plan.peak_bytes / _GIB))
    axes.set_ylabel("GiB")
    axes.set_title(_title(run).replace("$", r"\$"), fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], names[::-1], frameon=False, fontsize="small", loc="outside right upper")
    save_figure(figure, file)
