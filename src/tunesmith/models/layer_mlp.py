"""The second half of a decoder layer: the norm before the MLP, the MLP, what it adds to the stream, and their
backward. `tiles` calls the same functions for some tokens at a time.

Shape suffixes: T tokens, D hidden size, N columns of gate and up, I intermediate size, Q ranks of a group.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tunesmith.kernels.glu import glu, glu_backward_
from tunesmith.models import layer_norms
from tunesmith.models.adapter_math import adapter_a_gradient, add_dropped, output_gradients
from tunesmith.models.layer_call import AllOperands, LayerCall, Stash, Weights, beside
from tunesmith.models.layer_norms import Reader
from tunesmith.models.layer_products import input_gradient, project_onto, project_with_adapters
from tunesmith.models.layer_weights import Gradients
from tunesmith.models.projections import Operands, split_gradients


def onto(
    call: LayerCall,
    block: int,
    residual_TD: Tensor,
    x_TK: Tensor,
    stash: Stash,
    operands: Operands | None,
    weights: Weights,
) -> Tensor:
    """The residual stream after a block (0 attention, 1 MLP) whose last projection reads `x_TK`."""
    name = ("output", "down")[block]
    if call.norms[2 * block + 1] is None:
        return project_onto(call, name, residual_TD, x_TK, stash, operands, weights)
    branch_TD = project_onto(call, name, None, x_TK, stash, operands, weights)
    stash.large[f"branch{block}"] = branch_TD
    return layer_norms.behind(call, block, branch_TD, residual_TD, stash)


def mlp_input(call: LayerCall, stash: Stash) -> Tensor:
    """The stream that the norm before the MLP reads."""
    return call.only(stash.large["input"]) if call.shape.parallel else stash.large["middle"]


def compute_gate_up(call: LayerCall, stash: Stash, operands: AllOperands, weights: Weights) -> None:
    """gate and up `[T, N]` into the stash, without the adapters, which the activation kernels add."""
    normed_TD = layer_norms.before(call, 1, mlp_input(call, stash), stash)
    stash.large["gate_up"] = project_with_adapters(
        call, "gate_up", normed_TD, stash, operands.gate_up, weights
    )


def _activation_arguments(call: LayerCall, stash: Stash, operands: AllOperands) -> dict[str, Any]:
    arguments: dict[str, Any] = {"activation": call.shape.activation, "gated": call.shape.gated}
    if operands.gate_up is not None:
        arguments |= {
            "xa_TR": stash.small["u_gate_up"],
            "b_NR": operands.gate_up.b_NR,
            "rank": call.groups.gate_up.rank,
        }
    return arguments


def _activated(call: LayerCall, stash: Stash, operands: AllOperands) -> Tensor:
    """What the down projection reads `[T, I]`, in rows with room for its u; goes into the stash, and so does u where
    no dropout stands between."""
    gate_up_TN, group = stash.large["gate_up"], call.groups.down
    act_TI = gate_up_TN.new_empty(gate_up_TN.shape[0], group.inputs + beside(group))[:, : group.inputs]
    arguments = _activation_arguments(call, stash, operands)
    if operands.down is not None and group.dropout == 0.0 and "u_down" not in stash.small:
        a_QK = operands.down.a_QK
        stash.small["u_down"] = gate_up_TN.new_empty(gate_up_TN.shape[0], a_QK.shape[0])
        arguments |= {"down_a_RI": a_QK, "down_u_TR": stash.small["u_down"]}
    stash.large["act"] = glu(gate_up_TN, **arguments, out_TI=act_TI)
    return act_TI


def mlp_forward(
    call: LayerCall, residual_TD: Tensor, stash: Stash, operands: AllOperands, weights: Weights
) -> Tensor:
    """The residual stream after the MLP `[T, D]`; into the stash gate and up, the activation, what a norm reads."""
    compute_gate_up(call, stash, operands, weights)
    act_TI = _activated(call, stash, operands)
    return onto(call, 1, residual_TD, act_TI, stash, operands.down, weights)


def mlp_again(call: LayerCall, stash: Stash, operands: AllOperands, weights: Weights) -> None:
    """What backward reads of the MLP into the stash; what is there is not computed again."""
    large = stash.large
    if "gate_up" not in large:
        compute_gate_up(call, stash, operands, weights)
    if call.norms.behind_mlp is not None and "branch1" not in large:
        act_TI = _activated(call, stash, operands)
        large["branch1"] = project_onto(call, "down", None, act_TI, stash, operands.down, weights)


def mlp_backward(
    call: LayerCall,
    grad_TD: Tensor,
    stash: Stash,
    operands: AllOperands,
    weights: Weights,
    found: Gradients,
) -> Tensor:
    """∂ of the stream that the MLP reads, `grad_TD` included; gradients of its parameters go into `found`."""
    small, groups = stash.small, call.groups
    arguments = _activation_arguments(call, stash, operands)
    grad_branch_TD = layer_norms.through_behind(call, 1, grad_TD, stash, found)
    grad_act_TI = grad_branch_TD @ weights.take("down")
    grad_u = grad_b = None
    if operands.down is not None:
        grad_u, grad_b = output_gradients(grad_branch_TD, groups.down, operands.down, small["u_down"])
        if groups.down.dropout == 0.0:  # ∂a += ∂u A happens inside the activation's kernel
            arguments |= {"down_dxa_TR": grad_u, "down_a_RI": operands.down.a_QK}
        else:
            add_dropped(grad_act_TI, groups.down, operands.down, grad_u, call.seeds[3])
    grad_down_TD = grad_branch_TD if groups.down.trains else None
    del grad_branch_TD
    grad_gate_up_TN, act_TI = stash.large.pop("gate_up"), stash.large.pop("act", None)
    # in place: gate and up become their gradients, and ∂a becomes a where that was not kept
    grad_u_gate_up = glu_backward_(grad_gate_up_TN, grad_act_TI, recompute=act_TI is None, **arguments)
    act_TI = grad_act_TI if act_TI is None else act_TI
    if operands.down is not None:
        assert grad_u is not None
        assert grad_b is not None
        grad_a = adapter_a_gradient(act_TI, groups.down, grad_u, call.seeds[3])
        found.adapters["down"] = split_gradients(groups.down, grad_a, grad_b)
    if grad_down_TD is not None:
        found.put_own("down", groups.down, grad_down_TD, act_TI)
    del grad_act_TI, act_TI, grad_down_TD
    if operands.gate_up is not None:
        grad_u_gate_up, grad_b = output_gradients(
            grad_gate_up_TN, groups.gate_up, operands.gate_up, small["u_gate_up"], grad_u_TQ=grad_u_gate_up
        )
    grad_normed_TD = input_gradient(
        weights, "gate_up", groups.gate_up, operands.gate_up, grad_gate_up_TN, grad_u_gate_up
    )
    own_TN = grad_gate_up_TN if groups.gate_up.trains else None
    del grad_gate_up_TN
    reader = Reader("gate_up", groups.gate_up, operands.gate_up, own_TN, grad_u_gate_up, grad_b)
    stream_TD = mlp_input(call, stash)
    return layer_norms.through_before(call, 1, grad_normed_TD, stream_TD, stash, grad_TD, reader, found)
