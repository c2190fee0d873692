"""The rows that are compared, and what is taken from a result so that systems with other layouts can be.

Peers get the same numbers in the layout that they start from (q and k apart, gate and up apart), made before the
time is taken, and are called through their public functions. The products of adapters, which are fused into our
kernels, are in none of theirs, so a row with a rank has our time and plain torch's only.

Shape suffixes as in `tunesmith.kernels.catalog`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunesmith.kernels.catalog import CATALOG, SOFTMAX, Cost, Inputs, KernelRow, Size
from tunesmith.kernels.linear_logprob import linear_cross_entropy


class NotComparableError(Exception):
    """The peer has nothing that computes the same; the message says why."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A computation whose inputs are ready.

    Attributes:
        run: computes once; this is what is timed.
        read: what `run` returned → results by name, as in `named`.
    """

    run: Callable[[], Any]
    read: Callable[[Any], dict[str, Tensor]]


Peer = Mapping[str, Callable[[Size, Inputs], Prepared]]
"""By name of the row: (size, inputs) → computation. Raises `NotComparableError`."""


# ---------------------------------------------------------------------- the head, which is no row of the catalog


def _head_cases(size: Size, dtype: torch.dtype, device: torch.device) -> Inputs:
    rows, width, vocabulary = size["rows"], size["width"], size["vocabulary"]
    return {
        "hidden_SD": torch.randn((rows, width), device=device).to(dtype),
        "weight_VD": (torch.randn((vocabulary, width), device=device) * width**-0.5).to(dtype),
        "targets_S": torch.randint(0, vocabulary, (rows,), device=device),
    }


def _head(hidden_SD: Tensor, weight_VD: Tensor, targets_S: Tensor) -> Tensor:
    hidden_SD = hidden_SD.detach().requires_grad_()
    ones_S = torch.ones(len(hidden_SD), device=hidden_SD.device)
    return torch.autograd.grad(linear_cross_entropy(hidden_SD, weight_VD, targets_S, ones_S), hidden_SD)[0]


def _head_reference(hidden_SD: Tensor, weight_VD: Tensor, targets_S: Tensor) -> Tensor:
    hidden_SD = hidden_SD.detach().requires_grad_()
    logits_SV = (hidden_SD @ weight_VD.T).float()
    loss = torch.nn.functional.cross_entropy(logits_SV, targets_S, reduction="sum")
    return torch.autograd.grad(loss, hidden_SD)[0]


HEAD = KernelRow(
    name="linear_cross_entropy",
    op=_head,
    reference=_head_reference,
    cases=_head_cases,
    small=({"rows": 7, "width": 24, "vocabulary": 101},),
    large=(
        {"rows": 4096, "width": 4096, "vocabulary": 128256},
        {"rows": 4096, "width": 576, "vocabulary": 49152},
    ),
    tolerances=SOFTMAX,
    cost=lambda size, _: Cost(0, 6 * size["rows"] * size["width"] * size["vocabulary"]),
)
"""Forward and the gradient of the hidden states, the weight frozen. Bound by GEMMs, so it has no share of a copy."""

ROWS: dict[str, KernelRow] = {**CATALOG, HEAD.name: HEAD}


# ---------------------------------------------------------------------- layouts and results


def gate_and_up(gate_up_TN: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up as two tensors."""
    gate_TI, up_TI = gate_up_TN.chunk(2, -1)
    return gate_TI.contiguous(), up_TI.contiguous()


def q_and_k(size: Size, qkv_TN: Tensor) -> tuple[Tensor, Tensor]:
    """q and k as `[1, heads, T, head_dim]` over memory in which tokens come first, as projections leave them."""
    widths = [size["heads"] * size["head_dim"], size["kv_heads"] * size["head_dim"]]
    parts = qkv_TN[:, : sum(widths)].split(widths, -1)
    q, k = (part.unflatten(-1, (-1, size["head_dim"])).contiguous()[None].transpose(1, 2) for part in parts)
    return q, k


def named(name: str, size: Size, results: list[Tensor]) -> dict[str, Tensor]:
    """What every system computes of a row, from `tunesmith.kernels.measure.results` of our own functions."""
    if name == "rope_qkv_":
        return dict(zip("qk", q_and_k(size, results[-1]), strict=True))
    if name == "glu_backward_":
        return gate_gradients(gate_and_up(results[-2]))
    if name == "logprob_":
        return {"summed": results[0].double().sum()}
    return {"result": results[-1 if name in ("dequantize_nf4", "softmax_gradient_") else 0]}


def gate_gradients(pair: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Results of the backward of a gated unit."""
    return {"gradient of gate": pair[0], "gradient of up": pair[1]}


def result(value: Tensor) -> dict[str, Tensor]:
    """The only result."""
    return {"result": value}


def refuse_more(name: str, size: Size) -> None:
    """Refuse what our kernels fuse and no peer does.

    Raises:
        NotComparableError: the size asks for it.
    """
    if size.get("rank") or size.get("down_rank"):
        raise NotComparableError(
            "the products of adapters, which our kernel fuses, are GEMMs of their own there"
        )
    if size.get("recompute"):
        raise NotComparableError("its backward does not give the normalised values again")
    if size.get("rotary_dim"):
        raise NotComparableError("only whole heads are compared")
    if size.get("scale", 1.0) != 1.0:
        raise NotComparableError("only losses without a factor on the logits are compared")
    if size.get("activation", "silu") != "silu":
        raise NotComparableError("only SiLU is compared")
    if name.startswith("rms_norm") and size.get("offset"):
        raise NotComparableError("only norms without an offset are compared")
