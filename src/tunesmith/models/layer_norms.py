"""The norms around a layer's blocks: before a block, on the residual stream, or behind it, on what the block adds.

Shape suffixes: T tokens, D hidden size, Q ranks of a group's projections.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tunesmith.kernels.layer_norm import layer_norm, layer_norm_backward
from tunesmith.kernels.rms_norm import add_normed, rms_norm, rms_norm_backward
from tunesmith.models.adapter_math import adapter_a_gradient, input_gradients
from tunesmith.models.layer_call import LayerCall, LayerShape, Norm, Norms, Stash
from tunesmith.models.layer_weights import Gradients
from tunesmith.models.projections import Group, Operands, split_gradients

# ---------------------------------------------------------------------- kinds of norms


_Backward = tuple[Tensor, tuple[Tensor, ...], Tensor | None]
"""Gradient of the hidden states; of weight and bias, where they are wanted; the normed rows, where they are."""


def _rms(norm: Norm, hidden_TD: Tensor, shape: LayerShape) -> tuple[Tensor, Tensor]:
    return rms_norm(hidden_TD, norm.weight, shape.eps, offset=shape.norm_offset)[:2]


def _rms_backward(
    norm: Norm,
    grad_TD: Tensor,
    hidden_TD: Tensor,
    rstd_T: Tensor,
    shape: LayerShape,
    add_TD: Tensor | None,
    recompute: bool,
) -> _Backward:
    grad_hidden_TD, grad_weight_D, normed_TD = rms_norm_backward(
        grad_TD, hidden_TD, norm.weight, rstd_T, add_TD=add_TD, weight_grad=norm.trains,
        offset=shape.norm_offset, recompute=recompute,
    )  # fmt: skip
    return grad_hidden_TD, () if grad_weight_D is None else (grad_weight_D,), normed_TD


def _layer(norm: Norm, hidden_TD: Tensor, shape: LayerShape) -> tuple[Tensor, Tensor]:
    return layer_norm(hidden_TD, norm.weight, shape.eps, bias_D=norm.bias)


def _layer_backward(
    norm: Norm,
    grad_TD: Tensor,
    hidden_TD: Tensor,
    stats_2T: Tensor,
    _shape: LayerShape,
    add_TD: Tensor | None,
    recompute: bool,
) -> _Backward:
    grad_hidden_TD, grads_2D, normed_TD = layer_norm_backward(
        grad_TD, hidden_TD, norm.weight, stats_2T,
        bias_D=norm.bias, add_TD=add_TD, weight_grad=norm.trains, recompute=recompute,
    )  # fmt: skip
    return grad_hidden_TD, () if grads_2D is None else tuple(grads_2D.unbind()), normed_TD


@dataclass(frozen=True, slots=True)
class _Kind:
    """How a kind of norm is computed.

    Attributes:
        forward: (norm, hidden, shape) → normed rows, and what backward needs of the rows' statistics.
        backward: (norm, gradient, hidden, statistics, shape, what to add, whether the normed rows are wanted again).
    """

    forward: Callable[[Norm, Tensor, LayerShape], tuple[Tensor, Tensor]]
    backward: Callable[..., _Backward]


KINDS = {"rms": _Kind(_rms, _rms_backward), "layer": _Kind(_layer, _layer_backward)}

# ---------------------------------------------------------------------- before a block


def before(call: LayerCall, block: int, hidden_TD: Tensor, stash: Stash) -> Tensor:
    """The rows that a block (0 attention, 1 MLP) reads; statistics go into the stash."""
    norm = call.norms[2 * block]
    if norm is None:
        return hidden_TD
    normed_TD, stash.small[f"before{block}"] = KINDS[call.shape.norm].forward(norm, hidden_TD, call.shape)
    return normed_TD


class Reader(NamedTuple):
    """The group that reads a norm's rows, in backward.

    Attributes:
        name: of the group, `qkv` or `gate_up`.
        grad_TN: gradient of what it wrote, where anything of its own trains.
        grad_u_TQ: gradient of its adapters' x·Aᵀ; grad_b_NR of their B.
    """

    name: str
    group: Group
    operands: Operands | None
    grad_TN: Tensor | None
    grad_u_TQ: Tensor | None
    grad_b_NR: Tensor | None


def through_before(
    call: LayerCall,
    block: int,
    grad_normed_TD: Tensor,
    hidden_TD: Tensor,
    stash: Stash,
    add_TD: Tensor,
    reader: Reader,
    found: Gradients,
) -> Tensor:
    """∂h through the norm before a block, plus `add_TD`; gradients of the norm and of the group go into `found`.

    The adapters' part of `grad_normed_TD` is added here where they have dropout. ∂A needs the normed rows h · r · w
    (r the reciprocal root mean squares) but not their memory: ∂uᵀ(h r w) = ((∂u r)ᵀ h) w. In float16 ∂u · r would
    leave the range, and there, as with layer norms, the rows come out of the norm's own backward kernel. So they do
    for ∂W.
    """
    norm, group = call.norms[2 * block], reader.group
    grad_a = _early_a_gradient(call, block, grad_normed_TD, hidden_TD, stash, reader)
    rows_TD: Tensor | None = hidden_TD
    if norm is None:
        grad_TD = grad_normed_TD.add_(add_TD)
    else:
        late = reader.operands is not None and grad_a is None
        grad_TD, sums, rows_TD = KINDS[call.shape.norm].backward(
            norm, grad_normed_TD, hidden_TD, stash.small[f"before{block}"], call.shape, add_TD,
            late or group.trains_weight,
        )  # fmt: skip
        if sums:
            found.put_norm(Norms._fields[2 * block], norm, *sums)
    if reader.operands is not None:
        assert reader.grad_u_TQ is not None
        assert reader.grad_b_NR is not None
        if grad_a is None:
            assert rows_TD is not None
            grad_a = adapter_a_gradient(rows_TD, group, reader.grad_u_TQ, 0)
        found.adapters[reader.name] = split_gradients(group, grad_a, reader.grad_b_NR)
    if reader.grad_TN is not None:
        found.put_own(reader.name, group, reader.grad_TN, rows_TD)
    return grad_TD


def _early_a_gradient(
    call: LayerCall,
    block: int,
    grad_normed_TD: Tensor,
    hidden_TD: Tensor,
    stash: Stash,
    reader: Reader,
) -> Tensor | None:
    """∂A where it does without the rows of the norm's backward kernel, else None; completes ∂x under dropout."""
    norm, shape, group = call.norms[2 * block], call.shape, reader.group
    if reader.operands is not None:
        grad_u_TQ = reader.grad_u_TQ
        assert grad_u_TQ is not None
        if group.dropout > 0.0:
            normed_TD = before(call, block, hidden_TD, Stash())
            seed = call.seeds[2 * block]
            return input_gradients(grad_normed_TD, normed_TD, group, reader.operands, grad_u_TQ, seed)
        if norm is None:
            return adapter_a_gradient(hidden_TD, group, grad_u_TQ, 0)
        if shape.norm == "rms" and hidden_TD.dtype != torch.float16 and group.adapter_dtype.itemsize >= 4:
            rstd_T = stash.small[f"before{block}"]
            scaled_TQ = (grad_u_TQ * rstd_T[:, None]).to(grad_u_TQ.dtype)
            grad_a = adapter_a_gradient(hidden_TD, group, scaled_TQ, 0)
            return grad_a.mul_(norm.weight + shape.norm_offset)
    return None


# ---------------------------------------------------------------------- behind a block


def behind(call: LayerCall, block: int, branch_TD: Tensor, residual_TD: Tensor, stash: Stash) -> Tensor:
    """residual + norm(branch) for a block that has a norm behind it; statistics go into the stash."""
    norm, shape = call.norms[2 * block + 1], call.shape
    assert norm is not None
    assert shape.norm == "rms"
    assert shape.residual_multiplier == 1.0
    stream_TD, stash.small[f"behind{block}"] = add_normed(
        branch_TD, norm.weight, shape.eps, residual_TD, offset=shape.norm_offset
    )
    return stream_TD


def through_behind(call: LayerCall, block: int, grad_TD: Tensor, stash: Stash, found: Gradients) -> Tensor:
    """∂ of what a block's last projection wrote, from ∂ of the residual stream after it."""
    norm, shape = call.norms[2 * block + 1], call.shape
    if norm is None:
        return grad_TD if shape.residual_multiplier == 1.0 else grad_TD * shape.residual_multiplier
    branch_TD = stash.large.pop(f"branch{block}")
    stats_T = stash.small[f"behind{block}"]
    grad_branch_TD, sums, _ = KINDS[shape.norm].backward(
        norm, grad_TD, branch_TD, stats_T, shape, None, False
    )
    if sums:
        found.put_norm(Norms._fields[2 * block + 1], norm, *sums)
    return grad_branch_TD
