"""What this card reaches, measured in a few seconds at the shapes of the model, in place of the table's figures.

GEMMs of a layer, copies within the device's memory and over the host link, attention forward and backward: each is
timed alone, several calls in a row. Steps do not quite reach what kernels reach alone, since all units draw on the
same power; `IN_STEPS` is that share, from one H100. The outcome is remembered for each card, version and shape.

Whatever goes wrong, and whatever comes out that cannot be, the table's rates stand and a note says why: a plan that
is a little off is better than no run.

Shape suffixes: T tokens, N output columns, K input columns.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.kernels.attention import Documents, Heads, Scores, attention_backward, attention_forward
from tunesmith.kernels.remembered import outcome_file, recall, remember
from tunesmith.planning.amounts import LayerAmounts
from tunesmith.planning.cards import Rates
from tunesmith.planning.facts import LayerFacts, Work

TOKENS = 8_192
"""Tokens of a measurement: enough to fill a large card, and little memory beside a model that is already there."""

ELEMENTS = 2**27
"""Of the largest operand of a GEMM, for the same reason; 4,681 tokens of the widest one of the 8B shape."""

COPIED_BYTES = 256 * 2**20
"""Bytes of a copy: past any cache, and 5 ms of a host link."""

CALLS = 10
"""Timed calls of one kind, in a row, after two that warm up."""

IN_STEPS = {"products": 713 / 793, "attention_forward": 645 / 685, "attention_backward": 575 / 620}
"""What steps reach of what is reached alone: `planning.cards.MEASURED` over rates of kernels timed alone on such a
card (benchmarks/RESULTS.md)."""

BELIEVED = (0.2, 2.0)
"""A figure outside of these multiples of the table's is taken for a mistake of the measurement."""

Timer = Callable[[Callable[[], object]], float]
"""Seconds of one call on the device."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Rates to plan with.

    Attributes:
        rates: measured where they could be, else the table's.
        note: one sentence on what was not measured and why, empty where all was.
    """

    rates: Rates
    note: str = ""


def calibrate(
    layer: LayerFacts,
    work: Work,
    table: Rates,
    device: torch.device,
    dtype: torch.dtype,
    *,
    memory: Path | None = None,
    timer: Timer | None = None,
) -> Calibration:
    """Measure what the card reaches with a layer of the model.

    Takes about 1 GiB of device memory (1.5 GiB for the 70B shape) and gives it back, so peaks of memory are worth
    reading from afterwards only. Random states stay as they are.

    Args:
        layer: one of the model's; where they differ, the kind that there is most of.
        work: whose documents attention is measured with, as many of them as `TOKENS` hold.
        table: what stands where nothing can be measured, and what measurements are compared with.
        dtype: compute type of the run.
        memory: folder in which outcomes are remembered; None measures anew.
        timer: seconds of a call on the device, in place of the clock.
    """
    file = outcome_file(memory, device, layer=asdict(layer), dtype=str(dtype))
    found = recall(file, _believable)
    if found is None:
        try:
            found = _measure(layer, work, device, dtype, timer or _clock(device))
        except Exception as problem:  # out of memory, or what a backend raises, which has no base of its own
            lines = str(problem).splitlines() or [""]
            reason = f"{type(problem).__name__}: {lines[0][:160]}"
            return Calibration(
                table, f"The card's rates could not be measured, the table's are used ({reason})."
            )
        finally:
            _give_back(device)
        if not _doubted(found, table):
            remember(file, found)
    doubted = _doubted(found, table)
    measured: dict[str, Any] = {name: rate for name, rate in found.items() if name not in doubted}
    rates = replace(table, **measured)
    if doubted:
        names = ", ".join(
            f"{name} {found[name]:.3g} where {getattr(table, name):.3g} is known" for name in doubted
        )
        return Calibration(rates, f"Rates that cannot be were measured, the table's are used: {names}.")
    return Calibration(replace(rates, source="measured on this card", estimated=False))


_NAMES = {"products", "memory", "host_link", "attention_forward", "attention_backward"}


def _believable(outcome: Any) -> dict[str, float]:
    """The rates of a remembered outcome."""
    rates = {str(name): float(rate) for name, rate in outcome.items()}
    if rates.keys() != _NAMES or not all(math.isfinite(rate) and rate > 0 for rate in rates.values()):
        raise ValueError("these are not the rates of a card")
    return rates


def _doubted(found: dict[str, float], table: Rates) -> list[str]:
    """Names of figures that are not believed."""
    low, high = BELIEVED
    return [name for name, rate in found.items() if not low <= rate / getattr(table, name) <= high]


# ---------------------------------------------------------------------- what is measured


def _measure(
    layer: LayerFacts, work: Work, device: torch.device, dtype: torch.dtype, timer: Timer
) -> dict[str, float]:
    generator = torch.Generator(device).manual_seed(0)

    def random(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, device=device, dtype=dtype, generator=generator)

    found = {
        "products": _products(layer, work.tokens, random, timer),
        "memory": _memory(device, timer),
        "host_link": _host_link(device, timer),
    }
    forward, backward = _attention(layer, work, device, random, timer)
    found |= {"attention_forward": forward, "attention_backward": backward}
    return {name: rate * IN_STEPS.get(name, 1.0) for name, rate in found.items()}


def _products(layer: LayerFacts, tokens: int, random: Callable[[int, int], Tensor], timer: Timer) -> float:
    """Operations a second of the forward GEMMs of all groups, and of those for the gradients of their inputs."""
    operations = seconds = 0.0
    for outputs, inputs in layer.matrices.values():
        rows = min(TOKENS, tokens, max(1, ELEMENTS // max(outputs, inputs)))
        x_TK, weight_NK, grad_TN = random(rows, inputs), random(outputs, inputs), random(rows, outputs)
        seconds += timer(partial(torch.mm, x_TK, weight_NK.T)) + timer(partial(torch.mm, grad_TN, weight_NK))
        operations += 2 * 2.0 * rows * outputs * inputs
    return operations / seconds


def _memory(device: torch.device, timer: Timer) -> float:
    """Bytes a second that copying moves, reads and writes counted."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / timer(lambda: target.copy_(source))


def _host_link(device: torch.device, timer: Timer) -> float:
    """Bytes a second of the slower way between the device and pinned memory."""
    on_host = torch.empty(COPIED_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    on_device = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=device)
    out = timer(lambda: on_host.copy_(on_device, non_blocking=True))
    back = timer(lambda: on_device.copy_(on_host, non_blocking=True))
    return COPIED_BYTES / max(out, back)


def _attention(
    layer: LayerFacts,
    work: Work,
    device: torch.device,
    random: Callable[[int, int], Tensor],
    timer: Timer,
) -> tuple[float, float]:
    """Operations a second forward and backward, counted as plans count them."""
    lengths = _documents(work.documents)
    shortened = replace(work, documents=lengths, supervised=0)
    counted = LayerAmounts(layer, shortened, shortened.tokens)
    documents = Documents(lengths, torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32))
    heads = Heads(layer.heads, layer.kv_heads, layer.head_dim)
    scores = Scores(window=layer.window, softcap=50.0 if layer.softcap else None)
    fused_TN = random(shortened.tokens, heads.columns)
    output, backend, saved = attention_forward(fused_TN, heads, documents, scores=scores)
    grad = random(*output.shape)
    forward = timer(lambda: attention_forward(fused_TN, heads, documents, scores=scores, backend=backend))
    backward = timer(
        lambda: attention_backward(
            grad, fused_TN, output, saved, backend, heads, documents, scores=scores
        )
    )  # fmt: skip
    return counted.attended(0) / forward, counted.attended(1) / backward


def _documents(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """The first documents, cut at `TOKENS`."""
    kept: list[int] = []
    left = TOKENS
    for length in lengths:
        if left == 0:
            break
        kept.append(min(length, left))
        left -= kept[-1]
    return tuple(kept)


def _clock(device: torch.device) -> Timer:
    """Mean seconds of calls in a row: by events on a GPU, by the clock elsewhere."""

    def seconds(call: Callable[[], object]) -> float:
        for _ in range(2):
            call()
        if device.type != "cuda":
            started = time.perf_counter()
            for _ in range(CALLS):
                call()
            return (time.perf_counter() - started) / CALLS
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(CALLS):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / CALLS

    return seconds


def _give_back(device: torch.device) -> None:
    """Memory of the measurement back to the device."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
