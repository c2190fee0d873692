"""Curves as PNG files, drawn by matplotlib where it is installed: the loss of a run, and runs over each other."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tunesmith.contracts.errors import UserError
from tunesmith.contracts.visible import visible
from tunesmith.export.curves import AXES, Events, Point, series, smoothed, thinned

_MOST_POINTS = 2000


def draw_loss_curve(events: Events, path: Path) -> bool:
    """Write the loss curve of a run as a PNG; False where matplotlib is not installed or there is nothing to draw."""
    steps, evals = series(events, "step", "loss"), series(events, "eval", "loss")
    if not steps or find_spec("matplotlib") is None:
        return False
    figure, (axes,) = _figure(1)
    _plot(axes, steps, color="#9db4d0", linewidth=1, label="training loss per step")
    _plot(axes, smoothed(steps), color="#1f4e8c", linewidth=2, label="training loss, smoothed")
    if evals:
        _plot(axes, evals, color="#c8501e", marker="o", linewidth=2, label="held-out loss")
        for place, loss in (evals[0], evals[-1]):
            axes.annotate(
                f"{loss:.3f}", (place, loss), textcoords="offset points", xytext=(6, 6), color="#c8501e"
            )
    axes.margins(x=0.08, y=0.12)
    _finish(axes, AXES["steps"], "loss (nats per token)")
    save_figure(figure, path)
    return True


def draw_comparison(runs: Sequence[tuple[str, Events]], path: Path, axis: str = "steps") -> None:
    """Write the held-out and the training losses of runs, each over the other, as a PNG.

    Args:
        runs: name and events of each.
        axis: what they run over, one of `AXES`.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    check_matplotlib("leave out --png")
    figure, (above, below) = _figure(2)
    for number, (name, events) in enumerate(runs):
        color, label = f"C{number % 10}", visible(name).replace("$", r"\$")
        held, losses = series(events, "eval", "loss", axis), series(events, "step", "loss", axis)
        _plot(above, held, color=color, marker="o", markersize=4, linewidth=1.6, label=label)
        _plot(below, losses, color=color, linewidth=0.7, alpha=0.3)
        _plot(below, smoothed(losses), color=color, linewidth=1.8, label=label)
    _finish(above, "", "held-out loss (nats per token)", whole=axis == "steps")
    _finish(below, AXES[axis], "training loss, smoothed", whole=axis == "steps")
    try:
        save_figure(figure, path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}.",
            hint="Name a file, such as --png curves.png.",
        ) from None


def check_matplotlib(instead: str) -> None:
    """Refuse to draw without matplotlib.

    Args:
        instead: what else can be done, as the end of a sentence that begins with how to install it.

    Raises:
        UserError: it is not installed.
    """
    if find_spec("matplotlib") is None:
        raise UserError(
            "A PNG is drawn by matplotlib, which is not installed.",
            hint=f"Install it with `pip install 'tunesmith[plot]'`, or {instead}.",
        )


def new_figure(width: float, height: float) -> Any:
    """An empty figure of matplotlib that needs no screen; sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as a PNG, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    temporary = path.with_name(f".tmp-{path.name}.png")
    try:
        figure.savefig(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _figure(rows: int) -> tuple[Any, list[Any]]:
    figure = new_figure(8, 4.5 if rows == 1 else 3.4 * rows)
    return figure, list(figure.subplots(rows, 1, squeeze=False)[:, 0])


def _plot(axes: Any, points: Sequence[Point], **look: Any) -> None:
    if points:
        places, values = zip(*thinned(points, _MOST_POINTS), strict=True)
        axes.plot(places, values, **look)


def _finish(axes: Any, over: str, what: str, *, whole: bool = True) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(over)
    axes.set_ylabel(what)
    if whole:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False, fontsize="small")
