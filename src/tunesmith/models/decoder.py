"""A decoder layer with its forward and backward written by hand, as one autograd node.

    x₁ = norm(h)          qkv = x₁ W_qkvᵀ        (+ adapters and RoPE in one pass)      o = attention(qkv)
    m  = h + o W_oᵀ       x₂ = norm(m)           gu = x₂ W_guᵀ                          a = act(g) · u
    out = m + a W_dᵀ

That is Llama. Families differ in a row of data (`planning.architectures`, `LayerShape`): norms behind a block, on
what it adds, beside those before it or instead of them; norms on q and k; x₂ = x₁ where blocks are parallel; a factor
on what a block adds; other norms, activations and rotations.

What autograd on the stock modules costs and this does not: three GEMMs each for q, k, v and gate, up (one GEMM a
group here); an adapter product added in a pass of its own over the widest outputs (inside the RoPE and activation
kernels here); each 4-bit weight dequantised once per use (once per backward here, shared by recomputation and
gradient); norms and activations kept, or whole layers recomputed (what is kept is a `Policy` here).

The adapter's contribution is never merged into rounded weights: for q, k, v, gate and up it is added in float32,
for the output and down projections onto the residual stream. The contract of the node:
parameters that train, adapters, weights and norms alike, are its inputs and their gradients are returned, never
written to `.grad`, so DDP and FSDP2 see them; weights are read from the modules again in backward, so engines may
have freed them in between; gate and up are overwritten in backward, and a second backward through the same graph is
refused.

Shape suffixes: T tokens, D hidden size, N columns of qkv, I intermediate size, Q ranks of a group's projections.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunesmith.kernels.attention import attention_backward, attention_forward
from tunesmith.models import layer_norms, layer_qkv, tiles
from tunesmith.models.adapter_math import draw_seed, input_gradients, output_gradients
from tunesmith.models.layer_call import AllOperands, Groups, LayerCall, Stash, Weights, beside, stage_of
from tunesmith.models.layer_mlp import mlp_again, mlp_backward, mlp_forward, onto
from tunesmith.models.layer_norms import Reader
from tunesmith.models.layer_products import input_gradient, project_with_adapters
from tunesmith.models.layer_weights import Gradients, node_parameters
from tunesmith.models.offload import Handle
from tunesmith.models.projections import split_gradients

# ---------------------------------------------------------------------- forward, in two halves


def _attend(call: LayerCall, stash: Stash, operands: AllOperands, weights: Weights) -> None:
    """q, k, v and the output of attention into the stash; what is there is not computed again."""
    large, groups, shape = stash.large, call.groups, call.shape
    if "qkv" not in large:
        normed_TD = layer_norms.before(call, 0, large["input"], stash)
        qkv_TN = project_with_adapters(call, "qkv", normed_TD, stash, operands.qkv, weights)
        large["qkv"] = layer_qkv.kept_form_(call, qkv_TN, stash, operands.qkv)
    if "output" not in large:
        output_TN, stash.backend, saved = attention_forward(
            layer_qkv.for_attention(call, stash, operands.qkv), shape.heads, call.documents,
            scores=shape.scores, room=beside(groups.output),
        )  # fmt: skip
        large["output"] = output_TN
        large |= {f"attention.{number}": tensor for number, tensor in enumerate(saved)}


def _middle(call: LayerCall, stash: Stash, operands: AllOperands, weights: Weights) -> Tensor:
    """The residual stream after attention; one pass where what the norm behind attention reads is there."""
    residual_TD = call.only(stash.large["input"])
    if "branch0" in stash.large:
        return layer_norms.behind(call, 0, stash.large["branch0"], residual_TD, stash)
    output_TN = call.only(stash.large["output"], beside(call.groups.output))
    return onto(call, 0, residual_TD, output_TN, stash, operands.output, weights)


def layer_forward(call: LayerCall, hidden_TD: Tensor) -> tuple[Tensor, Stash]:
    """Output of the layer `[T, D]`, of `call.rows` where given, and everything that its backward may want to keep."""
    operands = AllOperands.build(call.groups, hidden_TD.dtype)
    stash = Stash(large={"input": hidden_TD}, operands=operands)
    weights = Weights(call.groups, hidden_TD.dtype, again=False, unpacked=call.unpacked)
    _attend(call, stash, operands, weights)
    middle_TD = _middle(call, stash, operands, weights)
    if not call.shape.parallel:  # else nothing reads it again
        stash.large["middle"] = middle_TD
    forward = tiles.mlp_forward if tiles.needed(call) else mlp_forward
    return forward(call, middle_TD, stash, operands, weights), stash


# ---------------------------------------------------------------------- backward, in two halves


def _attention_backward(
    call: LayerCall,
    grad_TD: Tensor,
    grad_stream_TD: Tensor,
    stash: Stash,
    operands: AllOperands,
    weights: Weights,
    found: Gradients,
) -> Tensor:
    """∂ of the layer's input; gradients of the parameters of attention go into `found`.

    Args:
        grad_TD: ∂ of the residual stream that attention adds to.
        grad_stream_TD: ∂ of the layer's input by all other ways.
    """
    small, large, groups = stash.small, stash.large, call.groups
    output_TN, hidden_TD = large["output"], large["input"]
    grad_branch_TD = layer_norms.through_behind(call, 0, grad_TD, stash, found)
    grad_output_TN = grad_branch_TD @ weights.take("output")
    if operands.output is not None or groups.output.trains:
        picked_TN = call.only(output_TN)
        if operands.output is not None:
            grad_u, grad_b = output_gradients(
                grad_branch_TD, groups.output, operands.output, small["u_output"]
            )
            grad_a = input_gradients(
                grad_output_TN, picked_TN, groups.output, operands.output, grad_u, call.seeds[1]
            )
            found.adapters["output"] = split_gradients(groups.output, grad_a, grad_b)
        if groups.output.trains:
            found.put_own("output", groups.output, grad_branch_TD, picked_TN)
        del picked_TN
    del grad_branch_TD
    saved = tuple(
        large[f"attention.{n}"] for n in range(sum(name.startswith("attention.") for name in large))
    )
    grad_stream_TD, grad_output_TN = call.spread(grad_stream_TD), call.spread(grad_output_TN)
    grad_qkv_TN = attention_backward(
        grad_output_TN, layer_qkv.for_attention(call, stash, operands.qkv), output_TN, saved, stash.backend,
        call.shape.heads, call.documents, scores=call.shape.scores, room=beside(groups.qkv),
    )  # fmt: skip
    layer_qkv.gradient_(call, grad_qkv_TN, stash, operands.qkv, found)
    grad_u_qkv = grad_b_qkv = None
    if operands.qkv is not None:
        grad_u_qkv, grad_b_qkv = output_gradients(grad_qkv_TN, groups.qkv, operands.qkv, small["u_qkv"])
    grad_normed_TD = input_gradient(weights, "qkv", groups.qkv, operands.qkv, grad_qkv_TN, grad_u_qkv)
    own_TN = grad_qkv_TN if groups.qkv.trains else None
    del grad_qkv_TN
    reader = Reader("qkv", groups.qkv, operands.qkv, own_TN, grad_u_qkv, grad_b_qkv)
    return layer_norms.through_before(
        call, 0, grad_normed_TD, hidden_TD, stash, grad_stream_TD, reader, found
    )


def layer_backward(call: LayerCall, grad_TD: Tensor, stash: Stash) -> tuple[Tensor, list[Tensor]]:
    """∂ of the layer's input `[T, D]` and of all that trains, in the order of `node_parameters`.

    Stages that the policy dropped are computed again first; `stash.large["input"]` is always there.
    """
    dtype = grad_TD.dtype
    operands = stash.operands or AllOperands.build(call.groups, dtype)
    weights = Weights(call.groups, dtype, again=True, unpacked=call.unpacked)
    large = stash.large
    _attend(call, stash, operands, weights)
    if "middle" not in large and not call.shape.parallel:
        large["middle"] = _middle(call, stash, operands, weights)
    grad_TD, found = grad_TD.contiguous(), Gradients()
    if tiles.needed(call):
        grad_stream_TD = tiles.mlp_backward(call, grad_TD, stash, operands, weights, found)
    else:
        mlp_again(call, stash, operands, weights)
        grad_stream_TD = mlp_backward(call, grad_TD, stash, operands, weights, found)
    large.pop("middle", None)  # nothing reads it again, and attention's backward needs the most
    # blocks in parallel: attention adds to the same stream as the MLP, and not to what that one reads
    grad_middle_TD = grad_TD if call.shape.parallel else grad_stream_TD
    grad_hidden_TD = _attention_backward(
        call, grad_middle_TD, grad_stream_TD, stash, operands, weights, found
    )
    return grad_hidden_TD, found.in_order()


# ---------------------------------------------------------------------- the node


class _DecoderLayer(torch.autograd.Function):
    """One node per layer; its inputs are the hidden states and every parameter that trains."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, call: LayerCall, *parameters: Tensor) -> Tensor:
        del parameters  # read from the modules; inputs only so that their gradients have somewhere to go
        out_TD, stash = layer_forward(call, hidden_TD)
        policy, large = call.policy, {"input": hidden_TD}
        large |= {name: tensor for name, tensor in stash.large.items() if call.keeps(name)}
        small = {name: tensor for name, tensor in stash.small.items() if not call.rebuilds(name)}
        moves = {name: tensor for name, tensor in large.items() if stage_of(name) in policy.offload}
        if moves and not policy.keep:  # then nothing of a layer's tokens stays on the device
            moves |= small
        stays = {name: tensor for name, tensor in (small | large).items() if name not in moves}
        ctx.call, ctx.backend, ctx.spent = call, stash.backend, False
        # a hundredth of what such a layer keeps, and three launches fewer in backward
        ctx.operands = stash.operands if "gate_up" in policy.keep else None
        ctx.small, ctx.stays, ctx.moves = set(small), tuple(stays), tuple(moves)
        ctx.handle = call.offloader.push(list(moves.values())) if moves else None
        if not moves:
            call.offloader.advance()
        ctx.save_for_backward(*stays.values())
        return out_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call: LayerCall = ctx.call
        if ctx.spent:  # kernels write past autograd's own version counter
            raise RuntimeError(
                "A fused decoder layer went backward a second time through the same graph. It has overwritten what "
                "it kept: run the forward pass again, or undo() the installation for gradients with retain_graph."
            )
        ctx.spent = True
        large = dict(zip(ctx.stays, ctx.saved_tensors, strict=True))
        handle: Handle | None = ctx.handle
        if handle is not None:
            large |= zip(ctx.moves, call.offloader.pull(handle), strict=True)
        small = {name: large.pop(name) for name in ctx.small}
        stash = Stash(small, large, ctx.backend, ctx.operands)
        ctx.operands = None  # whoever holds the loss holds the node until all layers are done
        del large
        with torch.autocast(grads[0].device.type, enabled=False):
            grad_hidden_TD, grads_parameters = layer_backward(call, grads[0], stash)
        return grad_hidden_TD, None, *grads_parameters


def run_layer(call: LayerCall, hidden_TD: Tensor) -> Tensor:
    """The layer's output `[T, D]`, differentiable in the hidden states and all that trains.

    Args:
        hidden_TD: everything is computed in its type, or in autocast's: weights that train are held in float32, and
            so are then the embeddings that the first layer reads.
    """
    device = hidden_TD.device.type
    if torch.is_autocast_enabled(device):
        hidden_TD = hidden_TD.to(torch.get_autocast_dtype(device))
    with torch.autocast(hidden_TD.device.type, enabled=False):
        if not torch.is_grad_enabled():
            return layer_forward(call, hidden_TD)[0]
        result: Tensor = _DecoderLayer.apply(  # type: ignore[no-untyped-call]
            hidden_TD, call, *node_parameters(call.groups, call.norms)
        )
    return result


def dropout_seeds(groups: Groups) -> tuple[int, int, int, int]:
    """A fresh seed for each group with dropout, 0 for the others."""
    qkv, output, gate_up, down = (draw_seed() if group.dropout > 0.0 else 0 for group in groups)
    return qkv, output, gate_up, down
