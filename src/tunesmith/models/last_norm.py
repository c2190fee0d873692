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
from tunesmith.models.layer_weights import norm_gradients, norm_parameters


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
        return grad_TD, None, None, *norm_gradients(norm, sums_D)


def last_norm_forward(stock: Callable[[Any, Tensor], Tensor], shape: LayerShape) -> Callable[..., Tensor]:
    """A `forward` for the norm behind the last of layers with these constants.

    Args:
        stock: what the module computes without; it does so where no gradient is asked for, as in generation.
    """

    def forward(module: Any, hidden_BTD: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return stock(module, hidden_BTD)
        norm = Norm.read(module)
        with torch.autocast(hidden_BTD.device.type, enabled=False):
            result: Tensor = _LastNorm.apply(  # type: ignore[no-untyped-call]
                hidden_BTD.flatten(0, -2), norm, shape, *norm_parameters(norm)
            )
        return result.view(hidden_BTD.shape)

    return forward
