"""A decoder layer with its forward and backward written by hand, as one autograd node.

    x₁ = norm(h)          qkv = x₁ W_qkvᵀ        (+ adapters and RoPE in one pass)      o = attention(qkv)
    m  = h + o W_oᵀ       x₂ = norm(m)           gu = x₂ W_guᵀ                          a = act(g) · u
    out = m + a W_dᵀ

What autograd on the stock modules costs and this does not: three GEMMs each for q, k, v and gate, up (one GEMM a
group here); an adapter product added in a pass of its own over the widest outputs (inside the RoPE and activation
kernels here); each 4-bit weight dequantised once per use (once per backward here, shared by recomputation and
gradient); norms and activations kept, or whole layers recomputed (what is kept is a `Policy` here).

The adapter's contribution is never merged into rounded weights: for q, k, v, gate and up it is added in float32,
for the output and down projections onto the residual stream. The contract of the node:
parameters that train are its inputs and their gradients are returned, never written to `.grad`, so DDP and FSDP2
see them; weights are read from the modules again in backward, so engines may have freed them in between; gate and
up are overwritten in backward, and a second backward through the same graph is refused.

Shape suffixes: T tokens, D hidden size, N columns of qkv, I intermediate size, Q ranks of a group's projections.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunesmith.kernels.attention import attention_backward, attention_forward
from tunesmith.kernels.glu import glu, glu_backward_
from tunesmith.kernels.rms_norm import rms_norm_backward
from tunesmith.models.adapter_math import (
    adapter_a_gradient,
    add_dropped,
    draw_seed,
    input_gradients,
    output_gradients,
)
from tunesmith.models.layer_call import (
    STAGE_TENSORS,
    AllOperands,
    Groups,
    LayerCall,
    Stash,
    Weights,
    beside,
)
from tunesmith.models.layer_products import input_gradient, project_onto, project_with_adapters
from tunesmith.models.offload import Handle
from tunesmith.models.projections import Group, Operands, adapter_parameters, split_gradients

# ---------------------------------------------------------------------- forward, in two halves


def _attention_half(
    call: LayerCall, hidden_TD: Tensor, stash: Stash, operands: AllOperands, weights: Weights
) -> Tensor:
    """The residual stream after attention; fills the stash. Small tensors that are there are not computed again."""
    small, large, groups = stash.small, stash.large, call.groups
    if "qkv" not in large:
        normed_TD, small["rstd0"] = call.norm(0, hidden_TD)
        qkv_TN = project_with_adapters(call, "qkv", normed_TD, stash, operands.qkv, weights)
        adapter = None
        if operands.qkv is not None:
            adapter = (small["u_qkv"], operands.qkv.b_NR, groups.qkv.rank)
        call.rope_(qkv_TN, adapter=adapter)
        large["qkv"] = qkv_TN
    if "output" not in large:
        room = 0 if call.moves("attention") else beside(groups.output)
        output_TN, stash.backend, saved = attention_forward(
            large["qkv"], call.shape.heads, call.documents, room=room
        )
        large["output"] = output_TN
        large |= {f"attention.{number}": tensor for number, tensor in enumerate(saved)}
    output_TN = call.only(large["output"], beside(groups.output))
    return project_onto(call, "output", call.only(hidden_TD), output_TN, stash, operands.output, weights)


def _gate_up(
    call: LayerCall, middle_TD: Tensor, stash: Stash, operands: AllOperands, weights: Weights
) -> Tensor:
    """gate and up `[T, 2I]` without the adapters, which the activation kernels add."""
    normed_TD, stash.small["rstd1"] = call.norm(1, middle_TD)
    return project_with_adapters(call, "gate_up", normed_TD, stash, operands.gate_up, weights)


def _activation_arguments(call: LayerCall, stash: Stash, operands: AllOperands) -> dict[str, Any]:
    arguments: dict[str, Any] = {"activation": call.shape.activation}
    if operands.gate_up is not None:
        arguments |= {
            "xa_TR": stash.small["u_gate_up"],
            "b_NR": operands.gate_up.b_NR,
            "rank": call.groups.gate_up.rank,
        }
    return arguments


def layer_forward(call: LayerCall, hidden_TD: Tensor) -> tuple[Tensor, Stash]:
    """Output of the layer `[T, D]`, of `call.rows` where given, and everything that its backward may want to keep."""
    operands = AllOperands.build(call.groups, hidden_TD.dtype)
    stash = Stash(operands=operands)
    weights = Weights(call.groups, hidden_TD.dtype, again=False)
    middle_TD = _attention_half(call, hidden_TD, stash, operands, weights)
    gate_up_TN = _gate_up(call, middle_TD, stash, operands, weights)
    stash.large |= {"middle": middle_TD, "gate_up": gate_up_TN}
    inner, room = call.groups.down.inputs, beside(call.groups.down)
    act_TI = hidden_TD.new_empty(middle_TD.shape[0], inner + room)[:, :inner]
    stash.large["act"] = glu(gate_up_TN, **_activation_arguments(call, stash, operands), out_TI=act_TI)
    return project_onto(call, "down", middle_TD, act_TI, stash, operands.down, weights), stash


# ---------------------------------------------------------------------- backward, in two halves


def _through_norm(
    call: LayerCall,
    number: int,
    grad_normed_TD: Tensor,
    hidden_TD: Tensor,
    rstd_T: Tensor,
    add_TD: Tensor,
    group: Group,
    operands: Operands | None,
    grad_u_TQ: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """∂h through a norm, and ∂A of the group that reads its rows.

    The adapters' part of `grad_normed_TD` is added here where they have dropout. ∂A needs the normed rows h · r · w
    (r the reciprocal root mean squares) but not their memory: ∂uᵀ(h r w) = ((∂u r)ᵀ h) w. In float16 ∂u · r would
    leave the range, and there the rows come out of the norm's own backward kernel.
    """
    offset = call.shape.norm_offset
    weight_D = call.norms[number].weight.to(hidden_TD.dtype)
    grad_a = None
    if operands is not None:
        assert grad_u_TQ is not None
        if group.dropout > 0.0:
            normed_TD, _ = call.norm(number, hidden_TD)
            seed = call.seeds[2 * number]
            grad_a = input_gradients(grad_normed_TD, normed_TD, group, operands, grad_u_TQ, seed)
        elif hidden_TD.dtype != torch.float16 and group.adapter_dtype.itemsize >= 4:
            scaled_TQ = (grad_u_TQ * rstd_T[:, None]).to(grad_u_TQ.dtype)
            grad_a = adapter_a_gradient(hidden_TD, group, scaled_TQ, 0).mul_(weight_D + offset)
    grad_TD, _, normed_again_TD = rms_norm_backward(
        grad_normed_TD, hidden_TD, weight_D, rstd_T,
        add_TD=add_TD, offset=offset, recompute=operands is not None and grad_a is None,
    )  # fmt: skip
    if normed_again_TD is not None and grad_u_TQ is not None:
        grad_a = adapter_a_gradient(normed_again_TD, group, grad_u_TQ, 0)
    return grad_TD, grad_a


def _mlp_backward(
    call: LayerCall, grad_TD: Tensor, stash: Stash, operands: AllOperands, weights: Weights
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """∂ of the middle residual stream, and of the adapters of gate-up and of down."""
    small, groups, middle_TD = stash.small, call.groups, stash.large["middle"]
    arguments = _activation_arguments(call, stash, operands)
    grad_act_TI = grad_TD @ weights.take("down")
    grad_u = grad_b = None
    if operands.down is not None:
        grad_u, grad_b = output_gradients(grad_TD, groups.down, operands.down, small["u_down"])
        if groups.down.dropout == 0.0:  # ∂a += ∂u A happens inside the activation's kernel
            arguments |= {"down_dxa_TR": grad_u, "down_a_RI": operands.down.a_QK}
        else:
            add_dropped(grad_act_TI, groups.down, operands.down, grad_u, call.seeds[3])
    grad_gate_up_TN, act_TI = stash.large.pop("gate_up"), stash.large.pop("act", None)
    # in place: gate and up become their gradients, and ∂a becomes a where that was not kept
    grad_u_gate_up = glu_backward_(grad_gate_up_TN, grad_act_TI, recompute=act_TI is None, **arguments)
    grads_down: list[Tensor] = []
    if operands.down is not None:
        assert grad_u is not None
        assert grad_b is not None
        act_TI = grad_act_TI if act_TI is None else act_TI
        grad_a = adapter_a_gradient(act_TI, groups.down, grad_u, call.seeds[3])
        grads_down = split_gradients(groups.down, grad_a, grad_b)
    del grad_act_TI, act_TI
    if operands.gate_up is not None:
        grad_u_gate_up, grad_b = output_gradients(
            grad_gate_up_TN, groups.gate_up, operands.gate_up, small["u_gate_up"], grad_u_TQ=grad_u_gate_up
        )
    grad_normed_TD = input_gradient(
        weights, "gate_up", groups.gate_up, operands.gate_up, grad_gate_up_TN, grad_u_gate_up
    )
    del grad_gate_up_TN
    grad_middle_TD, grad_a_gate_up = _through_norm(
        call,
        1,
        grad_normed_TD,
        middle_TD,
        small["rstd1"],
        grad_TD,
        groups.gate_up,
        operands.gate_up,
        grad_u_gate_up,
    )
    grads_gate_up: list[Tensor] = []
    if grad_a_gate_up is not None:
        assert grad_b is not None
        grads_gate_up = split_gradients(groups.gate_up, grad_a_gate_up, grad_b)
    return grad_middle_TD, grads_gate_up, grads_down


def _attention_backward(
    call: LayerCall, grad_TD: Tensor, stash: Stash, operands: AllOperands, weights: Weights
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """∂ of the layer's input, and of the adapters of q, k, v and of the output projection."""
    small, large, groups = stash.small, stash.large, call.groups
    output_TN, qkv_TN, hidden_TD = large["output"], large["qkv"], large["input"]
    grad_output_TN = grad_TD @ weights.take("output")
    grads_output: list[Tensor] = []
    if operands.output is not None:
        grad_u, grad_b = output_gradients(grad_TD, groups.output, operands.output, small["u_output"])
        picked_TN = call.only(output_TN)
        grad_a = input_gradients(
            grad_output_TN, picked_TN, groups.output, operands.output, grad_u, call.seeds[1]
        )
        grads_output = split_gradients(groups.output, grad_a, grad_b)
    saved = tuple(
        large[f"attention.{n}"] for n in range(sum(name.startswith("attention.") for name in large))
    )
    grad_TD, grad_output_TN = call.spread(grad_TD), call.spread(grad_output_TN)
    grad_qkv_TN = attention_backward(
        grad_output_TN, qkv_TN, output_TN, saved, stash.backend, call.shape.heads, call.documents,
        room=beside(groups.qkv),
    )  # fmt: skip
    call.rope_(grad_qkv_TN, inverse=True)
    grad_u_qkv = grad_b_qkv = None
    if operands.qkv is not None:
        grad_u_qkv, grad_b_qkv = output_gradients(grad_qkv_TN, groups.qkv, operands.qkv, small["u_qkv"])
    grad_normed_TD = input_gradient(weights, "qkv", groups.qkv, operands.qkv, grad_qkv_TN, grad_u_qkv)
    grad_hidden_TD, grad_a_qkv = _through_norm(
        call, 0, grad_normed_TD, hidden_TD, small["rstd0"], grad_TD, groups.qkv, operands.qkv, grad_u_qkv
    )
    grads_qkv: list[Tensor] = []
    if grad_a_qkv is not None:
        assert grad_b_qkv is not None
        grads_qkv = split_gradients(groups.qkv, grad_a_qkv, grad_b_qkv)
    return grad_hidden_TD, grads_qkv, grads_output


def layer_backward(call: LayerCall, grad_TD: Tensor, stash: Stash) -> tuple[Tensor, list[Tensor]]:
    """∂ of the layer's input `[T, D]` and of its adapters, in the order of `adapter_parameters`.

    Stages that the policy dropped are computed again first; `stash.large["input"]` is always there.
    """
    dtype = grad_TD.dtype
    operands = stash.operands or AllOperands.build(call.groups, dtype)
    weights = Weights(call.groups, dtype, again=True)
    if "middle" not in stash.large:
        stash.large["middle"] = _attention_half(call, stash.large["input"], stash, operands, weights)
    if "gate_up" not in stash.large:
        stash.large["gate_up"] = _gate_up(call, stash.large["middle"], stash, operands, weights)
    grad_TD = grad_TD.contiguous()
    grad_middle_TD, grads_gate_up, grads_down = _mlp_backward(call, grad_TD, stash, operands, weights)
    grad_hidden_TD, grads_qkv, grads_output = _attention_backward(
        call, grad_middle_TD, stash, operands, weights
    )
    return grad_hidden_TD, [*grads_qkv, *grads_output, *grads_gate_up, *grads_down]


# ---------------------------------------------------------------------- the node


class _DecoderLayer(torch.autograd.Function):
    """One node per layer; its inputs are the hidden states and every adapter parameter."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, call: LayerCall, *parameters: Tensor) -> Tensor:
        del parameters  # read from the modules; inputs only so that their gradients have somewhere to go
        out_TD, stash = layer_forward(call, hidden_TD)
        keep = {"input": hidden_TD}
        for stage in call.policy.keep:
            keep |= {name: tensor for name, tensor in stash.large.items() if STAGE_TENSORS[stage](name)}
        ctx.call, ctx.backend, ctx.handle, ctx.spent = call, stash.backend, None, False
        # a hundredth of what such a layer keeps, and three launches fewer in backward
        ctx.operands = stash.operands if "gate_up" in call.policy.keep else None
        ctx.small, ctx.large = tuple(stash.small), tuple(keep)
        if call.policy.offload:
            ctx.handle = call.offloader.push(list(keep.values()))
            ctx.save_for_backward(*stash.small.values())
        else:
            ctx.save_for_backward(*stash.small.values(), *keep.values())
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
        tensors = list(ctx.saved_tensors)
        small = dict(zip(ctx.small, tensors[: len(ctx.small)], strict=True))
        handle: Handle | None = ctx.handle
        kept = tensors[len(ctx.small) :] if handle is None else call.offloader.pull(handle)
        del tensors
        stash = Stash(small, dict(zip(ctx.large, kept, strict=True)), ctx.backend, ctx.operands)
        del kept
        with torch.autocast(grads[0].device.type, enabled=False):
            grad_hidden_TD, grads_parameters = layer_backward(call, grads[0], stash)
        return grad_hidden_TD, None, *grads_parameters


def run_layer(call: LayerCall, hidden_TD: Tensor) -> Tensor:
    """The layer's output `[T, D]`, differentiable in the hidden states and the adapters.

    Args:
        hidden_TD: float32, bfloat16 or float16; everything is computed in its type.
    """
    with torch.autocast(hidden_TD.device.type, enabled=False):
        if not torch.is_grad_enabled():
            return layer_forward(call, hidden_TD)[0]
        result: Tensor = _DecoderLayer.apply(  # type: ignore[no-untyped-call]
            hidden_TD, call, *adapter_parameters(call.groups)
        )
    return result


def dropout_seeds(groups: Groups) -> tuple[int, int, int, int]:
    """A fresh seed for each group with dropout, 0 for the others."""
    qkv, output, gate_up, down = (draw_seed() if group.dropout > 0.0 else 0 for group in groups)
    return qkv, output, gate_up, down
