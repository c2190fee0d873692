"""What the three runs of `loss_parity.py` show, as numbers, as lines and as a picture; needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

SMOOTH = 15
"""Steps of the centred mean that the strong lines and the smoothed differences are."""


def smooth(values: Sequence[float], width: int = SMOOTH) -> list[float]:
    """Centred mean over `width` steps, over those that there are at both ends."""
    half = width // 2
    windows = (values[max(0, at - half) : at + half + 1] for at in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def distance(losses: Sequence[float], truth: Sequence[float]) -> dict[str, float]:
    """How far a run is from the truth, in nats per token: step by step, and smoothed."""
    raw = [loss - exact for loss, exact in zip(losses, truth, strict=True)]
    smoothed = smooth(raw)
    return {
        "mean_abs": sum(map(abs, raw)) / len(raw),
        "max_abs": max(map(abs, raw)),
        "smoothed_mean_abs": sum(map(abs, smoothed)) / len(raw),
        "smoothed_max_abs": max(map(abs, smoothed)),
        "mean_signed": sum(raw) / len(raw),
    }


def compare(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The distances that the claim is about, and whether the fused run is no further from float32 than stock."""
    truth = runs["float32"]["losses"]
    fused, stock = (distance(runs[name]["losses"], truth) for name in ("fused", "stock"))
    return {
        "fused_to_float32": fused,
        "stock_to_float32": stock,
        "fused_to_stock": distance(runs["fused"]["losses"], runs["stock"]["losses"]),
        "no_larger": {
            key: fused[key] <= stock[key] for key in ("smoothed_mean_abs", "smoothed_max_abs", "mean_abs")
        },
    }


def report(record: Mapping[str, Any]) -> Iterator[str]:
    """Lines for people."""
    found = record["comparison"]
    yield "distance to float32, nats per token      fused      stock"
    for key in ("mean_abs", "max_abs", "smoothed_mean_abs", "smoothed_max_abs", "mean_signed"):
        fused, stock = (found[f"{name}_to_float32"][key] for name in ("fused", "stock"))
        yield f"  {key:32} {fused:11.2e} {stock:10.2e}"
    for name, run in record["runs"].items():
        before, after = run["held_out"]
        yield (
            f"held-out loss, {name:8} {before:.4f} -> {after:.4f}; its adapter in float32 "
            f"{run['held_out_float32']:.4f}; {run['seconds']:.0f} s"
        )
    for key, holds in found["no_larger"].items():
        yield f"|fused - float32| is no larger than |stock - float32|, {key}: {'yes' if holds else 'NO'}"


_FUSED, _STOCK, _EXACT = "#0072B2", "#D55E00", "#000000"  # Okabe and Ito's colours: told apart by everyone


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Draw losses (above) and their differences to float32 (below); the suffix of `path` decides the format."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    runs, found, settings = record["runs"], record["comparison"], record["settings"]
    half = record["compute_dtype"]
    labels = {
        "float32": "stock in float32, the reference",
        "stock": f"stock transformers + PEFT, {half}",
        "fused": f"Tunesmith, fused layers, {half}",
    }
    looks: dict[str, dict[str, Any]] = {
        "float32": {"color": _EXACT, "linewidth": 4.5, "alpha": 0.25},
        "stock": {"color": _STOCK, "linewidth": 2.0},
        "fused": {"color": _FUSED, "linewidth": 2.0, "linestyle": (0, (4, 2.5))},
    }
    figure = Figure(figsize=(9, 7.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    truth = runs["float32"]["losses"]
    at = range(1, len(truth) + 1)
    for name, look in looks.items():
        losses = runs[name]["losses"]
        faint = {"color": look["color"], "linewidth": 0.7, "alpha": 0.25}
        above.plot(at, losses, **faint)
        after = runs[name]["held_out"][1]
        above.plot(at, smooth(losses), label=f"{labels[name]}; held-out loss {after:.4f}", **look)
        if name != "float32":
            raw = [1e3 * (loss - exact) for loss, exact in zip(losses, truth, strict=True)]
            mean = 1e3 * found[f"{name}_to_float32"]["smoothed_mean_abs"]
            below.plot(at, raw, **faint)
            below.plot(
                at, smooth(raw), label=f"{name} − float32: smoothed, mean size {mean:.2g}·10⁻³", **look
            )
    below.axhline(0.0, color=_EXACT, linewidth=1.0, alpha=0.5)
    train = settings["train"]
    figure.suptitle(
        f"The same training three times: {settings['model']['name']}, LoRA rank {settings['adapter']['rank']}, "
        f"{settings['data']['train'][0]['path']}\n"
        f"{len(truth)} steps of {train['global_batch']} rows, same seed, order and adapter; {record['card']}, "
        f"{record['date']}",
        fontsize=11,
    )
    above.set_ylabel("training loss (nats per supervised token)")
    below.set_ylabel("difference (10⁻³ nats per token)")
    below.set_xlabel(f"optimizer step (thin: each step; strong: mean of the {SMOOTH} steps around it)")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)
