"""The norm behind the last decoder layer, with the kernels of the norms inside.

transformers computes it in float32, one operation after the other: autograd holds 4 bytes of every element of the
stream for it, and backward needs 22 for a moment, 45 GB for half a million tokens of the 8B shape. Here it holds the
stream itself and a number a row, and reads and writes each element once.

Shape suffixes: T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tunesmith.models.layer_call import LayerShape, Norm
from tunesmith.models.layer_norms import KINDS


class _LastNorm(torch.autograd.Function):
    """One node; its inputs are the stream and the parameters of the norm that train."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, norm: Norm, shape: LayerShape, *parameters: Tensor) -> Tensor:
        del parameters  # read from the module; inputs only so that their gradients have somewhere to go
        normed_TD, stats_T = KINDS[shape.norm].forward(norm, hidden_TD, shape)
        ctx.norm, ctx.shape = norm, shape
        ctx.save_for_backward(hidden_TD, stats_T)
        return normed_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, stats_T = ctx.saved_tensors
        norm: Norm = ctx.norm
        grad_TD, sums_D, _ = KINDS[ctx.shape.norm].backward(
            norm, grads[0].contiguous(), hidden_TD, stats_T, ctx.shape, None, False
        )
        trained = [
            grad_D.to(parameter.dtype)
            for grad_D, parameter, trains in zip(sums_D, _parameters(norm), _trains(norm), strict=False)
            if trains and parameter is not None
        ]
        return grad_TD, None, None, *trained


def _parameters(norm: Norm) -> tuple[Tensor | None, Tensor | None]:
    return norm.weight, norm.bias


def _trains(norm: Norm) -> tuple[bool, bool]:
    return norm.trains_weight, norm.trains_bias


def last_norm_forward(stock: Callable[[Any, Tensor], Tensor], shape: LayerShape) -> Callable[..., Tensor]:
    """A `forward` for the norm behind the last of layers with these constants.

    Args:
        stock: what the module computes without; it does so where no gradient is asked for, as in generation.
    """

    def forward(module: Any, hidden_BTD: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return stock(module, hidden_BTD)
        norm = Norm.read(module)
        trained = [
            p for p, trains in zip(_parameters(norm), _trains(norm), strict=True) if trains and p is not None
        ]
        with torch.autocast(hidden_BTD.device.type, enabled=False):
            result: Tensor = _LastNorm.apply(  # type: ignore[no-untyped-call]
                hidden_BTD.flatten(0, -2), norm, shape, *trained
            )
        return result.view(hidden_BTD.shape)

    return forward
