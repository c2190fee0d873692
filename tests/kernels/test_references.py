"""The torch references, which are what runs on a CPU, against plain float64 autograd and bitsandbytes."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.kernels.compare import SMALL, copied, error, label, results
from tunesmith.kernels.catalog import CATALOG
from tunesmith.kernels.nf4 import NF4_CODE, dequantize_nf4

FUNCTIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


def _norm(summed: Tensor, weight: Tensor, offset: float) -> Tensor:
    return functional.rms_norm(summed, summed.shape[-1:], offset + weight, eps=1e-6)


def rms_norm(*, hidden_TD, weight_D, eps, residual_TD, offset):
    summed = hidden_TD if residual_TD is None else hidden_TD + residual_TD
    return [_norm(summed, weight_D, offset), (summed.square().mean(-1) + eps) ** -0.5, summed]


def rms_norm_backward(*, grad_TD, summed_TD, weight_D, rstd_T, add_TD, weight_grad, offset, recompute):
    leaves = [summed_TD.requires_grad_(), weight_D.requires_grad_()]
    normed = _norm(*leaves, offset)
    hidden, weight = torch.autograd.grad(normed, leaves, grad_TD)
    hidden = hidden if add_TD is None else hidden + add_TD
    return [hidden, *([weight] if weight_grad else []), *([normed] if recompute else [])]


def _rotate(x_THK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Hugging Face's formula on the first columns of each head."""
    turned, rest = x_THK[..., : cos.shape[-1]], x_THK[..., cos.shape[-1] :]
    first, second = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, rest], -1)


def _rope(qkv, cos, sin, heads, kv_heads, head_dim, products):
    parts = list(qkv.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], -1))
    parts = [part + product for part, product in zip(parts, products, strict=True)]
    for index in (0, 1):
        heads_THK = parts[index].unflatten(-1, (-1, head_dim))
        parts[index] = _rotate(heads_THK, cos[:, None], sin[:, None]).flatten(1)
    return torch.cat(parts, -1)


def rope_qkv_(
    *, qkv_TN, cos_TK, sin_TK, heads, kv_heads, head_dim, rotary_dim, inverse, xa_TR, b_NR, rank, scale
):
    products = [0, 0, 0]
    if rank:
        columns = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        pairs = zip(xa_TR.chunk(3, -1), b_NR.split(columns), strict=True)
        products = [scale * xa @ b.T for xa, b in pairs]
    if not inverse:
        return [_rope(qkv_TN, cos_TK, sin_TK, heads, kv_heads, head_dim, products)]
    # the inverse is the vector-Jacobian product of the rotation, so long as cos² + sin² = 1
    leaf = torch.zeros_like(qkv_TN, requires_grad=True)
    turned = _rope(leaf, cos_TK, sin_TK, heads, kv_heads, head_dim, products)
    return list(torch.autograd.grad(turned, leaf, qkv_TN))


def _glu(gate_up, xa, b, activation, rank, scale):
    gate, up = gate_up.chunk(2, -1)
    if rank:
        (xa_g, xa_u), (b_g, b_u) = xa.chunk(2, -1), b.chunk(2)
        gate, up = gate + scale * xa_g @ b_g.T, up + scale * xa_u @ b_u.T
    return FUNCTIONS[activation](gate) * up


def glu(*, gate_up_TN, activation, xa_TR, b_NR, rank, scale):
    return [_glu(gate_up_TN, xa_TR, b_NR, activation, rank, scale)]


def glu_backward_(*, gate_up_TN, activation, xa_TR, b_NR, rank, scale, grad_act_TI, down_dxa_TR, down_a_RI):
    leaves = [gate_up_TN.requires_grad_()] + ([xa_TR.requires_grad_()] if rank else [])
    act = _glu(gate_up_TN, xa_TR, b_NR, activation, rank, scale)
    # the down projection reads act twice: through its weight, whose gradient is given, and through A
    upstream = [grad_act_TI] if down_dxa_TR is None else [grad_act_TI, down_dxa_TR]
    outputs = [act] if down_dxa_TR is None else [act, act @ down_a_RI.T]
    grads = torch.autograd.grad(outputs, leaves, upstream)
    return [*grads[1:], grads[0], act]


def _logprob(logits, targets, scale, softcap):
    z = logits * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return torch.log_softmax(z, -1).gather(-1, targets[:, None])[:, 0], torch.logsumexp(z, -1)


def softmax_gradient_(*, logits_CV, targets_C, scale, softcap):
    logprob, _ = _logprob(logits_CV.requires_grad_(), targets_C, scale, softcap)
    return [logprob, *torch.autograd.grad(logprob.sum(), logits_CV)]


def logprob_(*, logits_CV, targets_C, scale, softcap):
    return list(_logprob(logits_CV, targets_C, scale, softcap))


def adamw_(*, parameters, gradients, exp_avgs, exp_avg_sqs, steps, groups, options, max_norm):
    leaves = [torch.nn.Parameter(parameter) for parameter in parameters]
    options = [
        {"lr": lr, "betas": (b1, b2), "eps": eps, "weight_decay": decay} for lr, b1, b2, eps, decay in options
    ]
    optimizer = torch.optim.AdamW(
        [{"params": [leaf], **options[group]} for leaf, group in zip(leaves, groups, strict=True)]
    )
    states = [
        dict(zip(("step", "exp_avg", "exp_avg_sq"), s, strict=True))
        for s in zip(steps, exp_avgs, exp_avg_sqs, strict=True)
    ]
    for leaf, gradient, state in zip(leaves, gradients, states, strict=True):
        leaf.grad, optimizer.state[leaf] = gradient, state
    norm = torch.nn.utils.clip_grad_norm_(leaves, float("inf") if max_norm is None else max_norm)
    optimizer.step()
    return [norm, *leaves, *exp_avgs, *exp_avg_sqs, *steps]


def add_residual(y_TN, residual_TN, u_TR, b_NR):
    total = y_TN + residual_TN if u_TR is None else y_TN + residual_TN + u_TR @ b_NR.T
    return [total]


PLAIN = {
    "adamw_": adamw_,
    "add_residual": add_residual,
    "rms_norm": rms_norm,
    "rms_norm_backward": rms_norm_backward,
    "rope_qkv_": rope_qkv_,
    "glu": glu,
    "glu_backward_": glu_backward_,
    "softmax_gradient_": softmax_gradient_,
    "logprob_": logprob_,
}


def test_every_kernel_has_a_plain_computation():
    assert set(PLAIN) | {"dequantize_nf4"} == set(CATALOG)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "size"), [case for case in SMALL if case[0] in PLAIN], ids=label)
def test_reference_matches_autograd(name, size, dtype):
    torch.manual_seed(0)
    row = CATALOG[name]
    inputs = row.cases(size, dtype, torch.device("cpu"))
    exact = PLAIN[name](**copied(inputs, torch.float64))
    ours = results(row.op, row, inputs)
    tolerance = 1e-12 if dtype == torch.float64 else row.tolerances[dtype]
    assert len(ours) == len(exact)
    assert [error(*pair) < tolerance for pair in zip(ours, exact, strict=True)] == [True] * len(exact)


def test_without_a_residual_the_sum_is_the_input_itself():
    hidden = torch.randn(3, 8)
    assert CATALOG["rms_norm"].op(hidden, torch.ones(8), 1e-6)[2] is hidden


def test_columns_past_the_buffer_are_left_alone():
    qkv = torch.randn(4, 40)
    before = qkv[:, 32:].clone()
    cos, sin = torch.rand(4, 8), torch.rand(4, 8)
    CATALOG["rope_qkv_"].op(qkv, cos, sin, heads=2, kv_heads=1, head_dim=8)
    assert torch.equal(qkv[:, 32:], before)


def test_rotating_back_restores():
    size = CATALOG["rope_qkv_"].small[0]
    inputs = CATALOG["rope_qkv_"].cases(size, torch.float64, torch.device("cpu"))
    turned = copied(inputs)
    CATALOG["rope_qkv_"].op(**turned)
    assert not torch.allclose(turned["qkv_TN"], inputs["qkv_TN"])
    CATALOG["rope_qkv_"].op(**{**turned, "inverse": True})
    # the tables are made in float32: cos² + sin² is 1 to its precision
    assert torch.allclose(turned["qkv_TN"], inputs["qkv_TN"], atol=1e-6)


def test_glu_writes_into_a_wider_buffer():
    wide = torch.zeros(3, 12)
    act = CATALOG["glu"].op(torch.randn(3, 16), out_TI=wide[:, :8])
    assert act.data_ptr() == wide.data_ptr()
    assert wide[:, :8].count_nonzero() == 24
    assert wide[:, 8:].count_nonzero() == 0


def test_code_is_bitsandbytes():
    assert torch.equal(torch.tensor(NF4_CODE), bnb.get_4bit_type("nf4", device="cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("shape", [(5, 64), (67, 320), (7, 72), (6, 30), (1, 8)], ids=str)
def test_nf4_is_bitsandbytes_bit_for_bit(shape, nested, dtype):
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type="nf4")
    double = None
    if nested:
        second = state.state2
        double = (state.absmax, second.absmax, second.code, state.offset, second.blocksize)
    out = torch.full((shape[0], shape[1] + 5), 7.0, dtype=dtype)
    absmax = None if nested else state.absmax
    dequantize_nf4(packed, absmax, out[:, : shape[1]], code=state.code, nested=double)
    assert torch.equal(out[:, : shape[1]], bnb.dequantize_4bit(packed, state))
    assert (out[:, shape[1] :] == 7.0).all()
