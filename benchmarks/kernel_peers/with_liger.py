"""Liger's autograd functions, which its patches of models call (https://github.com/linkedin/Liger-Kernel)."""

from __future__ import annotations

import torch
from liger_kernel.ops import (
    LigerCrossEntropyFunction,
    LigerFusedAddRMSNormFunction,
    LigerFusedLinearCrossEntropyFunction,
    LigerRMSNormFunction,
    LigerRopeFunction,
    LigerSiLUMulFunction,
)
from torch import Tensor

from benchmarks.kernel_peers.rows import HEAD, Peer, Prepared, gate_and_up, gate_gradients, q_and_k, result
from tunesmith.kernels.catalog import Inputs, Size

_NORM = (0.0, "llama", False)  # offset, where it rounds, whether the gradient may be overwritten


def _rms_norm(_size: Size, inputs: Inputs) -> Prepared:
    hidden_TD, weight_D, eps = inputs["hidden_TD"], inputs["weight_D"], inputs["eps"]
    residual_TD = inputs["residual_TD"]
    if residual_TD is None:
        return Prepared(lambda: LigerRMSNormFunction.apply(hidden_TD, weight_D, eps, *_NORM), result)
    return Prepared(
        lambda: LigerFusedAddRMSNormFunction.apply(hidden_TD, residual_TD, weight_D, eps, *_NORM),
        lambda both: result(both[0]),
    )


def _rms_norm_backward(_size: Size, inputs: Inputs) -> Prepared:
    summed_TD = inputs["summed_TD"].detach().requires_grad_()
    weight_D = inputs["weight_D"].detach().requires_grad_(inputs["weight_grad"])
    wanted = (summed_TD, weight_D) if inputs["weight_grad"] else (summed_TD,)
    outputs: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]
    if inputs["add_TD"] is None:
        outputs = (LigerRMSNormFunction.apply(summed_TD, weight_D, 1e-6, *_NORM),)
        gradients = (inputs["grad_TD"],)
    else:
        nothing_TD = torch.zeros_like(summed_TD)
        outputs = LigerFusedAddRMSNormFunction.apply(summed_TD, nothing_TD, weight_D, 1e-6, *_NORM)
        gradients = (inputs["grad_TD"], inputs["add_TD"])
    return Prepared(
        lambda: torch.autograd.grad(outputs, wanted, gradients, retain_graph=True),
        lambda found: result(found[0]),
    )


def _rope(size: Size, inputs: Inputs) -> Prepared:
    q, k = q_and_k(size, inputs["qkv_TN"])
    cos, sin = inputs["cos_TK"][None], inputs["sin_TK"][None]
    if not size.get("inverse"):
        return Prepared(
            lambda: LigerRopeFunction.apply(q, k, cos, sin), lambda pair: dict(zip("qk", pair, strict=True))
        )
    leaves = [torch.empty_like(tensor).requires_grad_() for tensor in (q, k)]
    # in place on what the leaves hold, so that the forward reads copies of them
    turned = LigerRopeFunction.apply(*(leaf * 1 for leaf in leaves), cos, sin)
    return Prepared(
        lambda: torch.autograd.grad(turned, leaves, (q, k), retain_graph=True),
        lambda pair: dict(zip("qk", pair, strict=True)),
    )


def _glu(_size: Size, inputs: Inputs) -> Prepared:
    gate_TI, up_TI = gate_and_up(inputs["gate_up_TN"])
    return Prepared(lambda: LigerSiLUMulFunction.apply(gate_TI, up_TI), result)


def _glu_backward(_size: Size, inputs: Inputs) -> Prepared:
    halves = tuple(half.requires_grad_() for half in gate_and_up(inputs["gate_up_TN"]))
    act_TI, grad_TI = LigerSiLUMulFunction.apply(*halves), inputs["grad_act_TI"]
    return Prepared(lambda: torch.autograd.grad(act_TI, halves, grad_TI, retain_graph=True), gate_gradients)


def _loss(logits_CV: Tensor, inputs: Inputs) -> Tensor:
    loss: Tensor = LigerCrossEntropyFunction.apply(
        logits_CV, inputs["targets_C"], None, -100, 0.0, 0.0, "sum", inputs["softcap"]
    )[0]
    return loss


def _softmax_gradient(_size: Size, inputs: Inputs) -> Prepared:
    # the loss of logits that need a gradient writes the gradient over them
    logits_CV = inputs["logits_CV"].detach().requires_grad_()
    return Prepared(lambda: _loss(logits_CV, inputs), lambda _: result(-logits_CV.detach()))


def _logprob(_size: Size, inputs: Inputs) -> Prepared:
    return Prepared(lambda: _loss(inputs["logits_CV"], inputs), lambda loss: {"summed": -loss})


def _head(_size: Size, inputs: Inputs) -> Prepared:
    hidden_SD = inputs["hidden_SD"].detach().requires_grad_()
    others = (inputs["weight_VD"], inputs["targets_S"], None, None, -100, 0.0, 0.0, "sum")

    def run() -> Tensor:
        loss = LigerFusedLinearCrossEntropyFunction.apply(hidden_SD, *others)[0]
        return torch.autograd.grad(loss, hidden_SD)[0]

    return Prepared(run, result)


PEER: Peer = {
    "rms_norm": _rms_norm,
    "rms_norm_backward": _rms_norm_backward,
    "rope_qkv_": _rope,
    "glu": _glu,
    "glu_backward_": _glu_backward,
    "softmax_gradient_": _softmax_gradient,
    "logprob_": _logprob,
    HEAD.name: _head,
}
