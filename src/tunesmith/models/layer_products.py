"""The products of a layer's projections and their adapters: as few GEMMs and passes as the memory's layout allows.

The adapters of q, k, v and of gate and up share GEMMs with the weights: A lies below W, so that x [W; A]ᵀ gives y
and u = x Aᵀ side by side, and in backward [∂y | ∂u] [W; A] gives both parts of ∂x. B of the projections that write
onto the residual stream lies beside W: [x | u] [W | B]ᵀ. 4-bit weights are dequantised into such buffers; 16-bit ones
have room below where `join_weights` laid them, and none beside. Where a norm stands behind a block, the last product
of the block is rounded once, with its adapter in it, and the norm's pass adds it to the stream.

Shape suffixes: T tokens, D hidden size, N output columns, K input columns, Q = P·R columns of all projections' ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from tunesmith.kernels.residual import add_residual
from tunesmith.models.adapter_math import adapter_input, product
from tunesmith.models.layer_call import LayerCall, Stash, Weights, beside
from tunesmith.models.projections import Group, Operands


def _project(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    return x_TK @ weight_NK.T if bias_N is None else torch.addmm(bias_N, x_TK, weight_NK.T)


def project_with_adapters(
    call: LayerCall, name: str, x_TK: Tensor, stash: Stash, operands: Operands | None, weights: Weights
) -> Tensor:
    """x Wᵀ (+ bias); u = x Aᵀ goes into the stash, for the kernel that adds u Bᵀ later.

    Where the weight has room for A, one GEMM with [W; A] gives both, in rows that have room for ∂u behind ∂y when
    backward writes over them.
    """
    group: Group = getattr(call.groups, name)
    small, key, bias_N = stash.small, f"u_{name}", group.bias(x_TK.dtype)
    if operands is None:
        return _project(x_TK, weights.get(name), bias_N)
    if group.foldable:
        weight = weights.get(name, operands)
        if weight.shape[0] > group.columns:
            rows_TN = x_TK.new_empty(x_TK.shape[0], group.columns + beside(group))
            wide_TN = rows_TN[:, : weight.shape[0]]
            if bias_N is None:
                torch.mm(x_TK, weight.T, out=wide_TN)
            else:
                torch.addmm(pad(bias_N, (0, group.foldable)), x_TK, weight.T, out=wide_TN)
            # a copy: reading u from between wide rows costs the RoPE kernel more than the product would
            small[key] = wide_TN[:, group.columns :].contiguous()
            return rows_TN[:, : group.columns]
    else:
        weight = weights.get(name)
    if key not in small:
        small[key] = adapter_input(x_TK, group, operands, call.seeds[call.groups._fields.index(name)])
    return _project(x_TK, weight, bias_N)


def project_onto(
    call: LayerCall,
    name: str,
    residual_TD: Tensor | None,
    x_TK: Tensor,
    stash: Stash,
    operands: Operands | None,
    weights: Weights,
) -> Tensor:
    """residual + multiplier · (x Wᵀ (+ bias) + u Bᵀ), or the latter without a residual; u goes into the stash
    unless it is there already.

    Where the rows of x have room for u and the weight has room for B, one GEMM of [x | u] and [W | B] forms both
    products in one sum. Elsewhere the product stays in float32 until everything is added: rounded before, it would
    often lie halfway between two numbers, and the smallest adapter would decide to which it goes.
    """
    group: Group = getattr(call.groups, name)
    small, key, bias_D = stash.small, f"u_{name}", group.bias(x_TK.dtype)
    scale = 1.0 if residual_TD is None else call.shape.residual_multiplier
    if operands is None:
        return _onto(_project(x_TK, weights.get(name), bias_D), residual_TD, scale)
    if key not in small:
        small[key] = adapter_input(x_TK, group, operands, call.seeds[call.groups._fields.index(name)])
    wide_TK = _with_room(x_TK, group)
    weight = weights.get(name, None if wide_TK is None else operands)
    if wide_TK is not None and weight.shape[1] > group.inputs:
        wide_TK[:, group.inputs :] = small[key]
        return _onto(_project(wide_TK, weight, bias_D), residual_TD, scale)
    y_TD = product(x_TK, weight.T, torch.float32)
    if bias_D is not None:
        y_TD += bias_D
    return add_residual(y_TD, residual_TD, u_TR=small[key], b_NR=operands.b_NR, scale=scale)


def _onto(y_TD: Tensor, residual_TD: Tensor | None, scale: float) -> Tensor:
    """residual + scale · y, in the memory of y."""
    if residual_TD is None:
        return y_TD
    return torch.add(residual_TD, y_TD, alpha=scale, out=y_TD)


def input_gradient(
    weights: Weights,
    name: str,
    group: Group,
    operands: Operands | None,
    grad_TN: Tensor,
    grad_u_TQ: Tensor | None,
) -> Tensor:
    """∂y W, and + ∂u A unless dropout stands between.

    Where the rows of ∂y have room for ∂u and the weight has room for A, one GEMM of [∂y | ∂u] and [W; A] gives both,
    in one sum and without a pass over the result.
    """
    if operands is None or grad_u_TQ is None or group.dropout > 0.0:
        return grad_TN @ weights.take(name)
    wide_TN = _with_room(grad_TN, group)
    weight = weights.take(name, None if wide_TN is None else operands)
    if wide_TN is not None and weight.shape[0] > group.columns:
        wide_TN[:, group.columns :] = grad_u_TQ
        return wide_TN @ weight
    return (grad_TN @ weight).addmm_(grad_u_TQ, operands.a_QK)


def _with_room(rows_TN: Tensor, group: Group) -> Tensor | None:
    """The rows with the columns behind them that were left free for u or ∂u, or None where none were."""
    tokens, columns = rows_TN.shape
    if not group.foldable or rows_TN.stride(0) != columns + beside(group):
        return None
    return rows_TN.as_strided((tokens, columns + group.foldable), rows_TN.stride())
