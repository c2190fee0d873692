"""Unsloth's kernels through `unsloth.kernels` (https://github.com/unslothai/unsloth).

Its training adds residuals in plain torch, so that addition is in its times of the norm.
"""

from __future__ import annotations

from types import SimpleNamespace

import unsloth  # noqa: F401  # first: it patches what is imported after it
from unsloth.kernels import (
    fast_cross_entropy_loss,
    fast_dequantize,
    fast_rms_layernorm,
    fast_rope_embedding,
    swiglu_DWf_DW_dfg_kernel,
    swiglu_fg_kernel,
)

# isort: split
import torch
from torch import Tensor

from benchmarks.kernel_peers.rows import Peer, Prepared, gate_and_up, gate_gradients, q_and_k, result
from benchmarks.kernel_peers.with_bitsandbytes import quant_state
from tunesmith.kernels.catalog import Inputs, Size


def _rms_norm(_size: Size, inputs: Inputs) -> Prepared:
    norm = SimpleNamespace(weight=inputs["weight_D"], variance_epsilon=inputs["eps"])
    hidden_TD, residual_TD = inputs["hidden_TD"][None], inputs["residual_TD"]

    def run() -> Tensor:
        summed_TD = hidden_TD if residual_TD is None else hidden_TD + residual_TD
        normed: Tensor = fast_rms_layernorm(norm, summed_TD)
        return normed

    return Prepared(run, lambda normed: result(normed[0]))


def _rms_norm_backward(_size: Size, inputs: Inputs) -> Prepared:
    summed_TD = inputs["summed_TD"][None].detach().requires_grad_()
    weight_D = inputs["weight_D"].detach().requires_grad_(inputs["weight_grad"])
    wanted = (summed_TD, weight_D) if inputs["weight_grad"] else (summed_TD,)
    norm = SimpleNamespace(weight=weight_D, variance_epsilon=1e-6)
    normed_TD, grad_TD, add_TD = (
        fast_rms_layernorm(norm, summed_TD),
        inputs["grad_TD"][None],
        inputs["add_TD"],
    )

    def run() -> Tensor:
        gradient = torch.autograd.grad(normed_TD, wanted, grad_TD, retain_graph=True)[0]
        return gradient if add_TD is None else gradient + add_TD

    return Prepared(run, lambda gradient: result(gradient[0]))


def _rope(size: Size, inputs: Inputs) -> Prepared:
    q, k = q_and_k(size, inputs["qkv_TN"])
    cos_TK, sin_TK = inputs["cos_TK"], inputs["sin_TK"]
    if not size.get("inverse"):
        return Prepared(
            lambda: fast_rope_embedding(q, k, cos_TK, sin_TK), lambda pair: dict(zip("qk", pair, strict=True))
        )
    leaves = [torch.empty_like(tensor).requires_grad_() for tensor in (q, k)]
    # in place on what the leaves hold, so that the forward reads copies of them
    turned = fast_rope_embedding(*(leaf * 1 for leaf in leaves), cos_TK, sin_TK)
    return Prepared(
        lambda: torch.autograd.grad(turned, leaves, (q, k), retain_graph=True),
        lambda pair: dict(zip("qk", pair, strict=True)),
    )


def _glu(_size: Size, inputs: Inputs) -> Prepared:
    gate, up = (half[None] for half in gate_and_up(inputs["gate_up_TN"]))
    return Prepared(lambda: swiglu_fg_kernel(gate, up), lambda act: result(act[0]))


def _glu_backward(_size: Size, inputs: Inputs) -> Prepared:
    (gate, up), grad = gate_and_up(inputs["gate_up_TN"]), inputs["grad_act_TI"].contiguous()
    # returns what the forward gave, the gradient of up and that of gate, in place
    return Prepared(
        lambda: swiglu_DWf_DW_dfg_kernel(grad, gate, up), lambda found: gate_gradients((found[2], found[1]))
    )


def _loss(logits_CV: Tensor, inputs: Inputs) -> Tensor:
    loss: Tensor = fast_cross_entropy_loss(
        logits_CV[None], inputs["targets_C"][None], logit_softcapping=inputs["softcap"] or 0, n_items=1
    )
    return loss


def _softmax_gradient(_size: Size, inputs: Inputs) -> Prepared:
    logits_CV = inputs["logits_CV"].detach().requires_grad_()
    return Prepared(
        lambda: torch.autograd.grad(_loss(logits_CV, inputs), logits_CV)[0], lambda found: result(-found)
    )


def _logprob(_size: Size, inputs: Inputs) -> Prepared:
    return Prepared(lambda: _loss(inputs["logits_CV"], inputs), lambda loss: {"summed": -loss})


def _dequantize(_size: Size, inputs: Inputs) -> Prepared:
    packed, state = inputs["packed"], quant_state(inputs)
    return Prepared(lambda: fast_dequantize(packed, state), result)


PEER: Peer = {
    "rms_norm": _rms_norm,
    "rms_norm_backward": _rms_norm_backward,
    "rope_qkv_": _rope,
    "glu": _glu,
    "glu_backward_": _glu_backward,
    "dequantize_nf4": _dequantize,
    "softmax_gradient_": _softmax_gradient,
    "logprob_": _logprob,
}
