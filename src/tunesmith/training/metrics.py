"""`events.jsonl` and the loss curve: what a run leaves behind about itself."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch

from tunesmith.contracts.events import Event


def peak_memory_gib(device: torch.device) -> float:
    """Peak of allocated GPU memory since start, or the peak resident size of this process, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: they are written as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return value


def read_events(path: Path) -> list[dict[str, Any]]:
    """All complete events of a file; a last line cut off by a kill is left out."""
    if not path.is_file():
        return []
    events = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events


class EventLog:
    """Observer that appends every event to `events.jsonl`, one JSON object a line.

    Args:
        path: the file.
        keep_until: on resume, events after this step are dropped, because those steps run again.
    """

    def __init__(self, path: Path, *, keep_until: int | None = None) -> None:
        kept = [
            event for event in read_events(path) if keep_until is not None and event["step"] <= keep_until
        ]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(event) + "\n" for event in kept), encoding="utf-8")
        temporary.replace(path)
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def on_event(self, event: Event) -> None:
        """Append the event and hand it to the operating system."""
        record = {name: _finite(value) for name, value in event.record().items()}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential mean with the bias of its start removed; it remembers a tenth of the run, at most ten steps."""
    smoothed, mean = [], 0.0
    weight = 1 - 1 / min(10.0, max(2.0, len(values) / 10))
    for count, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        smoothed.append(mean / (1 - weight**count))
    return smoothed


def draw_loss_curve(events: list[dict[str, Any]], path: Path) -> bool:
    """Write the loss curve as a PNG; False where matplotlib is not installed or there is nothing to draw."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return False
    steps = [e for e in events if e["event"] == "step" and isinstance(e["loss"], float)]
    evals = [e for e in events if e["event"] == "eval" and isinstance(e["loss"], float)]
    if not steps:
        return False
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    numbers, losses = [e["step"] for e in steps], [e["loss"] for e in steps]
    axes.plot(numbers, losses, color="#9db4d0", linewidth=1, label="training loss per step")
    axes.plot(numbers, _smooth(losses), color="#1f4e8c", linewidth=2, label="training loss, smoothed")
    if evals:
        axes.plot(
            [e["step"] for e in evals], [e["loss"] for e in evals],
            color="#c8501e", marker="o", linewidth=2, label="held-out loss",
        )  # fmt: skip
        for event in (evals[0], evals[-1]):
            axes.annotate(
                f"{event['loss']:.3f}", (event["step"], event["loss"]),
                textcoords="offset points", xytext=(6, 6), color="#c8501e",
            )  # fmt: skip
    axes.margins(x=0.08, y=0.12)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary)
    temporary.replace(path)
    return True
