"""What the peers' scripts share: one step of a transformers-like model, measured in each layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.batches import LAYOUTS, Documents, documents, random_documents
from benchmarks.loop import Timing, release, time_steps
from benchmarks.peers.flops import step_flops
from benchmarks.peers.tables import OPTIMIZERS, RANK, Work

BATCHES = 4
"""Different batches, taken in turn."""

Inputs = dict[str, Any]


def batches_of(work: Work) -> list[Documents]:
    """The documents of the batches; the same for every system."""
    lengths = documents(work.rows, work.length, work.mean)
    return [random_documents(lengths, work.supervised, seed) for seed in range(BATCHES)]


def row_of(work: Work, batches: list[Documents], layout: str, timing: Timing, positions: int) -> Inputs:
    """The measured row of results.

    Args:
        positions: that go through the model at a step, padding included.
    """
    first = batches[0]
    return {
        "layout": layout,
        "status": "ok",
        **timing.row(sum(first.lengths)),
        "tokens": sum(first.lengths),
        "positions": positions,
        "supervised": first.supervised,
        "batch": first.digest,
        "flops": step_flops(
            work.config,
            first.lengths,
            first.supervised,
            0 if work.adapter == "full" else RANK,
            full=work.adapter == "full",
        ),
    }


def failure(layout: str, error: BaseException) -> Inputs:
    """The row of a layout that could not be measured."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return {"layout": layout, "status": "oom", "reason": lines[0][:200]}


def _adamw(trained: list[torch.nn.Parameter], rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained, lr=rate, fused=True)


def _adamw_8bit(trained: list[torch.nn.Parameter], rate: float) -> torch.optim.Optimizer:
    import bitsandbytes

    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(trained, lr=rate)
    return optimizer


PEERS_OPTIMIZERS = {"adamw": _adamw, "adamw_8bit": _adamw_8bit}
"""What stands for an optimizer of ours in the peers' steps."""


def _time_layout(model: Any, work: Work, inputs: list[Inputs], device: torch.device) -> Timing:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    name, rate = OPTIMIZERS[work.adapter]
    optimizer = PEERS_OPTIMIZERS[name](trained, rate)

    def step(number: int) -> torch.Tensor:
        loss = model(**inputs[number % BATCHES]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return time_steps(step, steps=work.steps, warm=work.warm, device=device)


def measure_layouts(
    model: Any,
    work: Work,
    device: torch.device,
    adapt: Callable[[str, Documents, Inputs], Inputs] | None = None,
) -> Iterator[Inputs]:
    """Time the model, in training mode, in each layout of `work`, from the same parameters each time.

    Args:
        adapt: changes the keyword arguments of a forward on the device, for what a system wants besides.
    """
    batches = batches_of(work)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    again = len(work.layouts) > 1
    initial = [parameter.detach().to("cpu", copy=True) for parameter in trained] if again else []
    for layout in work.layouts:
        with torch.no_grad():
            for parameter, value in zip(trained, initial, strict=again):
                parameter.copy_(value)
        inputs: list[Inputs] = [
            {name: tensor.to(device) for name, tensor in LAYOUTS[layout](row).items()} for row in batches
        ]
        if adapt is not None:
            inputs = [adapt(layout, row, given) for row, given in zip(batches, inputs, strict=True)]
        try:
            timing = _time_layout(model, work, inputs, device)
            row = row_of(work, batches, layout, timing, inputs[0]["input_ids"].numel())
        except torch.OutOfMemoryError as error:
            row = failure(layout, error)
        model.zero_grad(set_to_none=True)
        del inputs
        release(device)
        yield row
