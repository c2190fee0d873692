"""The torch references, which are what runs on a CPU, against plain float64 autograd and bitsandbytes."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.kernels.attention_plain import packed_attention, packed_attention_backward
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


def add_normed(*, residual_TD, hidden_TD, weight_D, eps, offset):
    rstd = (hidden_TD.square().mean(-1) + eps) ** -0.5
    return [residual_TD + _norm(hidden_TD, weight_D, offset), rstd]


def _layer_norm(hidden, weight, bias):
    return functional.layer_norm(hidden, hidden.shape[-1:], weight, bias, eps=1e-5)


def layer_norm(*, hidden_TD, weight_D, eps, bias_D):
    stats = [hidden_TD.mean(-1), (hidden_TD.var(-1, correction=0) + eps) ** -0.5]
    return [_layer_norm(hidden_TD, weight_D, bias_D), torch.stack(stats)]


def layer_norm_backward(
    *, grad_TD, hidden_TD, weight_D, bias_D, stats_2T, add_TD, weight_grad, recompute
):  # fmt: skip
    bias = torch.zeros_like(weight_D) if bias_D is None else bias_D
    leaves = [leaf.requires_grad_() for leaf in (hidden_TD, weight_D, bias)]
    normed = _layer_norm(*leaves)
    hidden, *weights = torch.autograd.grad(normed, leaves, grad_TD)
    hidden = hidden if add_TD is None else hidden + add_TD
    return [hidden, *([torch.stack(weights)] if weight_grad else []), *([normed] if recompute else [])]


def _rotate(x_THK: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool) -> Tensor:
    """Pairs of a head's first columns as complex numbers, times e to the angle."""
    turned, rest = x_THK[..., :rotary_dim], x_THK[..., rotary_dim:]
    half = rotary_dim // 2
    angle = torch.complex(cos[:, None, :half], sin[:, None, :half])
    if interleaved:
        pairs = torch.view_as_complex(turned.unflatten(-1, (half, 2)).contiguous())
        return torch.cat([torch.view_as_real(pairs * angle).flatten(-2), rest], -1)
    pairs = torch.complex(turned[..., :half].contiguous(), turned[..., half:].contiguous()) * angle
    return torch.cat([pairs.real, pairs.imag, rest], -1)


def _parts(qkv, heads, kv_heads, head_dim, xa, b, rank, scale):
    """q, k and v with their adapters."""
    columns = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    parts = list(qkv.split(columns, -1))
    if rank:
        xas = xa.chunk(3, -1) if xa.shape[1] > rank else [xa] * 3
        parts = [p + scale * x @ y.T for p, x, y in zip(parts, xas, b.split(columns), strict=True)]
    return [part.unflatten(-1, (-1, head_dim)) for part in parts]


def rope_qkv_(
    *, qkv_TN, cos_TK, sin_TK, heads, kv_heads, head_dim, rotary_dim, inverse, xa_TR, b_NR, rank, scale,
    interleaved,
):  # fmt: skip
    def turned(qkv):
        q, k, v = _parts(qkv, heads, kv_heads, head_dim, xa_TR, b_NR, rank, scale)
        q, k = (_rotate(part, cos_TK, sin_TK, rotary_dim or head_dim, interleaved) for part in (q, k))
        return torch.cat([part.flatten(1) for part in (q, k, v)], -1)

    if not inverse:
        return [turned(qkv_TN)]
    # the inverse is the vector-Jacobian product of the rotation
    leaf = torch.zeros_like(qkv_TN, requires_grad=True)
    return list(torch.autograd.grad(turned(leaf), leaf, qkv_TN))


def qk_norm_rope(*, qkv_TN, cos_TK, sin_TK, layout, norms, adapter):
    adapted = (None, None, 0, 1.0) if adapter is None else adapter
    q, k, v = _parts(qkv_TN, layout.heads, layout.kv_heads, layout.head_dim, *adapted)
    turned = []
    for part, weight in ((q, norms.q_weight_K), (k, norms.k_weight_K)):
        rows = part.flatten(1) if norms.full else part
        normed = _norm(rows, weight, norms.offset).view_as(part)
        turned.append(_rotate(normed, cos_TK, sin_TK, 2 * layout.half, layout.interleaved))
    return [torch.cat([part.flatten(1) for part in (*turned, v)], -1)]


def qk_norm_rope_backward_(*, grad_TN, qkv_TN, norms, weight_grad, **others):
    leaves = [leaf.requires_grad_() for leaf in (qkv_TN, norms.q_weight_K, norms.k_weight_K)]
    (out,) = qk_norm_rope(qkv_TN=qkv_TN, norms=norms, **others)
    qkv, *weights = torch.autograd.grad(out, leaves, grad_TN)
    return [*(weights if weight_grad else []), qkv]


def _glu(gate_up, xa, b, activation, gated, rank, scale):
    if not gated:
        return FUNCTIONS[activation](gate_up + scale * xa @ b.T if rank else gate_up)
    gate, up = gate_up.chunk(2, -1)
    if rank:
        (xa_g, xa_u), (b_g, b_u) = xa.chunk(2, -1) if xa.shape[1] > rank else (xa, xa), b.chunk(2)
        gate, up = gate + scale * xa_g @ b_g.T, up + scale * xa_u @ b_u.T
    return FUNCTIONS[activation](gate) * up


def glu(*, gate_up_TN, activation, gated, xa_TR, b_NR, rank, scale, down_a_RI, down_u_TR):
    act = _glu(gate_up_TN, xa_TR, b_NR, activation, gated, rank, scale)
    return [act] if down_u_TR is None else [act, act @ down_a_RI.T]


def glu_backward_(
    *, gate_up_TN, activation, gated, xa_TR, b_NR, rank, scale, grad_act_TI, down_dxa_TR, down_a_RI
):
    leaves = [gate_up_TN.requires_grad_()] + ([xa_TR.requires_grad_()] if rank else [])
    act = _glu(gate_up_TN, xa_TR, b_NR, activation, gated, rank, scale)
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


def adamw_(*, parameters, gradients, exp_avgs, exp_avg_sqs, steps, groups, options, max_norm, seed):
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


def add_residual(y_TN, residual_TN, u_TR, b_NR, scale):
    total = scale * (y_TN if u_TR is None else y_TN + u_TR @ b_NR.T)
    return [total if residual_TN is None else residual_TN + total]


def gather_rows(table_VD, ids_N):
    return [functional.one_hot(ids_N, len(table_VD)).to(table_VD.dtype) @ table_VD]


PLAIN = {
    "adamw_": adamw_,
    "add_residual": add_residual,
    "add_normed": add_normed,
    "layer_norm": layer_norm,
    "layer_norm_backward": layer_norm_backward,
    "rms_norm": rms_norm,
    "rms_norm_backward": rms_norm_backward,
    "rope_qkv_": rope_qkv_,
    "qk_norm_rope": qk_norm_rope,
    "qk_norm_rope_backward_": qk_norm_rope_backward_,
    "gather_rows": gather_rows,
    "glu": glu,
    "glu_backward_": glu_backward_,
    "softmax_gradient_": softmax_gradient_,
    "logprob_": logprob_,
    "packed_attention": packed_attention,
    "packed_attention_backward": packed_attention_backward,
}


def test_every_kernel_has_a_plain_computation():
    # these have tests of their own below, and in test_adamw_8bit.py
    assert set(PLAIN) | {"dequantize_nf4", "adamw_8bit_"} == set(CATALOG)


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
