"""Every kernel in one table: what computes it, what it is measured against, on which inputs, and what it costs.

Tests, benchmarks and the canary walk `CATALOG`; a kernel that is not in it is not tested. A new kernel is one row
and one function that makes its inputs.

A size is a plain dict of the numbers and options that `cases` reads. Bytes count every operand once, as read or
written, whatever a kernel really reads twice: they are what a roofline is drawn from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunesmith.kernels import attention_rows
from tunesmith.kernels.adamw import adamw_, adamw_reference_
from tunesmith.kernels.adamw_8bit import adamw_8bit_, adamw_8bit_reference_, scales_of
from tunesmith.kernels.attention_triton import (
    packed_attention,
    packed_attention_backward,
    packed_attention_backward_reference,
    packed_attention_reference,
)
from tunesmith.kernels.cross_entropy import (
    logprob_,
    logprob_reference_,
    softmax_gradient_,
    softmax_gradient_reference_,
)
from tunesmith.kernels.gather_rows import gather_rows, gather_rows_reference
from tunesmith.kernels.glu import glu, glu_backward_, glu_backward_reference_, glu_reference
from tunesmith.kernels.launch import accumulation_dtype
from tunesmith.kernels.layer_norm import (
    layer_norm,
    layer_norm_backward,
    layer_norm_backward_reference,
    layer_norm_reference,
)
from tunesmith.kernels.nf4 import NF4_CODE, dequantize_nf4, dequantize_nf4_reference
from tunesmith.kernels.qk_norm import (
    Adapter,
    Norms,
    qk_norm_rope,
    qk_norm_rope_backward_,
    qk_norm_rope_backward_reference_,
    qk_norm_rope_reference,
)
from tunesmith.kernels.residual import add_residual, add_residual_reference
from tunesmith.kernels.rms_norm import (
    add_normed,
    add_normed_reference,
    rms_norm,
    rms_norm_backward,
    rms_norm_backward_reference,
    rms_norm_reference,
)
from tunesmith.kernels.rope import RotaryLayout, rope_qkv_, rope_qkv_reference_

Size = Mapping[str, Any]
Inputs = dict[str, Any]
"""Arguments by name, for `op` and `reference` alike."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one call cannot do without.

    Attributes:
        bytes: every operand read or written once.
        flops: additions and multiplications; an exponential counts as one.
    """

    bytes: int
    flops: int


@dataclass(frozen=True, slots=True)
class KernelRow:
    """A row of the table.

    Attributes:
        name: that of the public function.
        op: the public function.
        reference: the same computation in plain torch, with the same signature.
        cases: (size, dtype, device) → arguments.
        small: odd sizes and every option, for tests; some milliseconds in the interpreter.
        large: sizes of real models, for benchmarks.
        tolerances: largest relative error against float64, ‖ours − exact‖ / ‖exact‖, of each result.
        cost: (size, bytes of an element) → cost of a call.
        mutates: arguments that the function writes.
    """

    name: str
    op: Callable[..., Any]
    reference: Callable[..., Any]
    cases: Callable[[Size, torch.dtype, torch.device], Inputs]
    small: tuple[Size, ...]
    large: tuple[Size, ...]
    tolerances: Mapping[torch.dtype, float]
    cost: Callable[[Size, int], Cost]
    mutates: tuple[str, ...] = ()


# Accumulated in float32 and rounded once: the error is that of one rounding, at most half an ulp (2^-9 for
# bfloat16, 2^-12 for float16 relative to the upper end of a binade, 2^-11 to the lower). Sums of rounded values
# (residual sums, grad_xa from the rounded gradient) round a second time. In float32 the approximate exponential
# and reciprocal square root of the card, 2 ulp each, are what is left.
ROUNDED = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
ROUNDED_TWICE = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 8e-4}
"""The gradient of x·Aᵀ is formed from gradients that are rounded already, and rounded itself, and so is act·Aᵀ;
adapters too large to be fused are added in a pass that rounds once more. Few elements do not average the errors."""
# A moment at the edge of two codes may take the other one, which is a hundredth of a code or less over a few hundred
# elements; parameters in bfloat16 are rounded by up to a whole unit in the last place, 2^-7.
IN_8_BITS = {torch.float32: 1e-3, torch.bfloat16: 8e-3, torch.float16: 1e-3}
# Numbers are copied and not computed; above zero, because an error has to stay below it.
EXACT = dict.fromkeys(ROUNDED, 1e-12)
# An lse of magnitude 10 is exact to 1e-6, which is a relative error of the probabilities.
SOFTMAX = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def _normal(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, pad: int = 0) -> Tensor:
    """A normal matrix whose row stride exceeds its width by `pad`."""
    *rows, width = shape
    return torch.randn((*rows, width + pad), device=device).to(dtype)[..., :width]


# ---------------------------------------------------------------------- rows of a table on the host


def _gather_rows_cases(size: Size, dtype: torch.dtype, device: torch.device) -> Inputs:
    rows, columns, tokens = size["rows"], size["columns"], size["tokens"]
    table_VD = _normal((rows, columns), dtype, device, size.get("pad", 0))
    ids_N = torch.randint(0, rows, (tokens,), device=device)
    ids_N[0], ids_N[-1] = 0, rows - 1  # the ends of the table
    return {"table_VD": _on_host(table_VD), "ids_N": ids_N}


def _on_host(value: Tensor) -> Tensor:
    """What lies on a GPU in pinned memory, its strides kept."""
    if not value.is_cuda:
        return value
    host = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, pin_memory=True)
    return host.copy_(value)


def _gather_rows_cost(size: Size, itemsize: int) -> Cost:
    return Cost(size["tokens"] * (2 * size["columns"] * itemsize + 8), 0)


# ---------------------------------------------------------------------- norm


def _rms_norm_cases(size: Size, dtype: torch.dtype, device: torch.device) -> Inputs:
    shape, pad = (size["tokens"], size["width"]), size.get("pad", 0)
    return {
        "hidden_TD": _normal(shape, dtype, device, pad),
        "weight_D": _normal(shape[1:], dtype, device),
        "eps": 1e-6,
        "residual_TD": _normal(shape, dtype, device) if size.get("residual") else None,
        "offset": size.get("offset", 0.0),
    }


def _rms_norm_cost(size: Size, itemsize: int) -> Cost:
    elements = size["tokens"] * size["width"]
    passes = 4 if size.get("residual") else 2
    return Cost(passes * elements * itemsize, (5 if size.get("residual") else 4) * elements)


def _rms_norm_backward_cases(size: Size, dtype: torch.dtype, device: torch.device) -> Inputs:
    shape, pad = (size["tokens"], size["width"]), size.get("pad", 0)
    summed_TD = _normal(shape, dtype, device, pad)
    return {
        "grad_TD": _normal(shape, dtype, device, pad),
        "summed_TD": summed_TD,
        "weight_D": _normal(shape[1:], dtype, device),
        "rstd_T": torch.rsqrt(summed_TD.to(accumulation_dtype(dtype)).square().mean(-1) + 1e-6),
        "add_TD": _normal(shape, dtype, device) if size.get("add") else None,
        "weight_grad": size.get("weight_grad", False),
        "offset": size.get("offset", 0.0),
        "recompute": size.get("recompute", False),
    }


def _rms_norm_backward_cost(size: Size, itemsize: int) -> Cost:
    elements = size["tokens"] * size["width"]
    passes = 3 + bool(size.get("add")) + bool(size.get("recompute"))
    return Cost(passes * elements * itemsize, (8 + 2 * bool(size.get("weight_grad"))) * elements)


def _add_normed_cases(size: Size, dtype: torch.dtype, device: torch.device) -> Inputs:
    return _rms_norm_cases({**size, "residual": True}, dtype, device)


def _add_normed_cost(size: Size, itemsize: int) -> Cost:
    elements = size["tokens"] * size["width"]
    return Cost(3 * elements * itemsize, 5 * elements)


def _layer_norm_cases(size: Size, dtype: torch.dtype, device: torch.device) -> Inputs:
    shape, pad = (size["tokens"], size["width"]), size.get("pad", 0)
    return {
        "hidden_TD": _normal(shape, dtype, device, pad) + size.get("mean", 0.0),
        "weight_D": _normal(shape[1:], dtype, device),
        "eps": 1e-5,
        "bias_D": _normal(shape[1:], dtype, device) if size.get("bias") else None,
    }


def _layer_norm_cost(size: Size, itemsize: int) -> Cost:
    elements = size["tokens"] * size["width"]
    return Cost(2 * elements * itemsize, 7 * elements)


def _layer_norm_backward_cases(size: Size, dtype: torch.dtype, device: torch.device) -> Inputs:
    inputs = _layer_norm_cases(size, dtype, device)
    shape, eps = inputs["hidden_TD"].shape, inputs.pop("eps")
    stats_2T = layer_norm_reference(inputs["hidden_TD"], inputs["weight_D"], eps)[1]
    return {
        **inputs,
        "grad_TD": _normal(shape, dtype, device, size.get("pad", 0)),
        "stats_2T": stats_2T,
        "add_TD": _normal(shape, dtype, device) if size.get("add") else None,
        "weight_grad": size.get("weight_grad", False),
        "recompute": size.get("recompute", False),
    }


def _layer_norm_backward_cost(size: Size, itemsize: int) -> Cost:
    elements = size["tokens"] * size["width"]
    passes = 3 + bool(size.get("add")) + bool(size.get("recompute"))
    return Cost(passes * elements * itemsize, (10 + 3 * bool(size.get("weight_grad"))) * elements)


# ---------------------------------------------------------------------- residual stream


def _residual_cases(size: Size, dtype: torch.dtype, device: torch.device) -> Inputs:
    tokens, columns, rank, pad = size["tokens"], size["columns"], size.get("rank", 0), size.get("pad", 0)
    return {
        "y_TN": _normal((tokens, columns), accumulation_dtype(dtype), device, pad),
        "residual_TN": None if size.get("alone") else _normal((tokens, columns), dtype, device),
        "scale": size.get("scale", 1.0),
        "u_TR": _normal((tokens, rank), dtype, device, pad) if rank else None,
        "b_NR": _normal((columns, rank), dtype, device) if rank else None,
    }


def _residual_cost(size: Size, itemsize: int) -> Cost:
    tokens, columns, rank = size["tokens"], size["columns"], size.get("rank", 0)
    moved = (1 if size.get("alone") else 2) * tokens * columns + rank * (tokens + columns)
    return Cost(moved * itemsize + 4 * tokens * columns, 2 * (rank + 1) * tokens * columns)


# ---------------------------------------------------------------------- rotary positions


def _rope_cases(size: Size, dtype: torch.dtype, device: torch.device) -> Inputs:
    tokens, heads, kv_heads, head_dim = (size[key] for key in ("tokens", "heads", "kv_heads", "head_dim"))
    rotary_dim, rank = size.get("rotary_dim"), size.get("rank", 0)
    columns = (heads + 2 * kv_heads) * head_dim
    cos_TK, sin_TK = _angles(size, dtype, device)
    return {
        "qkv_TN": _normal((tokens, columns), dtype, device, size.get("pad", 0)),
        "cos_TK": cos_TK,
        "sin_TK": sin_TK,
        "interleaved": size.get("interleaved", False),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "rotary_dim": rotary_dim,
        "inverse": size.get("inverse", False),
        "xa_TR": _shared(size, 3, dtype, device),
        "b_NR": _normal((columns, rank), dtype, device) if rank else None,
        "rank": rank,
        "scale": 0.5,
    }


def _angles(size: Size, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every pair, twice over as transformers has them: side by side, or one after the other
    and then every second one with `spread`."""
    half = (size.get("rotary_dim") or size["head_dim"]) // 2
    angle_TK = torch.rand((size["tokens"], half), device=device) * 6.28
    if size.get("spread"):
        twice = angle_TK.repeat_interleave(2, -1)
        return twice.cos().to(dtype)[:, ::2], twice.sin().to(dtype)[:, ::2]
    twice = torch.cat([angle_TK, angle_TK], -1)
    return twice.cos().to(dtype), twice.sin().to(dtype)


def _shared(size: Size, projections: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """x·Aᵀ of so many projections, of one for all with `shared`, or None without an adapter."""
    rank = size.get("rank", 0)
    ranks = rank if size.get("shared") else projections * rank
    return _normal((size["tokens"], ranks), dtype, device, size.get("pad", 0)) if rank else None


def _rope_cost(size: Size, itemsize: int) -> Cost:
    tokens, rank, head_dim = size["tokens"], size.get("rank", 0), size["head_dim"]
    rotated = (size["heads"] + size["kv_heads"]) * head_dim
    columns = rotated + size["kv_heads"] * head_dim
    table = 2 * tokens * (size.get("rotary_dim") or head_dim) // 2
    elements = tokens * 2 * (columns if rank else rotated) + table + rank * (3 * tokens + columns)
    return Cost(elements * itemsize, 3 * tokens * rotated + 2 * rank * tokens * columns)


def _qk_norm_cases(size: Size, dtype: torch.dtype, device: torch.device) -> Inputs:
    heads, kv_heads, head_dim = (size[key] for key in ("heads", "kv_heads", "head_dim"))
    rotary_dim, rank, full = size.get("rotary_dim"), size.get("rank", 0), size.get("full", False)
    layout = RotaryLayout(heads, kv_heads, head_dim, rotary_dim, size.get("interleaved", False))
    columns = sum(layout.sizes)
    q_weight_K, k_weight_K = (
        _normal((count * head_dim if full else head_dim,), dtype, device) for count in (heads, kv_heads)
    )
    xa_TR, adapter = _shared(size, 3, dtype, device), None
    if xa_TR is not None:
        adapter = Adapter(xa_TR, _normal((columns, rank), dtype, device), rank, 0.5)
    cos_TK, sin_TK = _angles(size, dtype, device)
    return {
        "qkv_TN": _normal((size["tokens"], columns), dtype, device, size.get("pad", 0)),
        "cos_TK": cos_TK,
        "sin_TK": sin_TK,
        "layout": layout,
        "norms": Norms(q_weight_K, k_weight_K, 1e-6, size.get("offset", 0.0), full),
        "adapter": adapter,
    }


def _qk_norm_cost(size: Size, itemsize: int) -> Cost:
    tokens, rank, columns = size["tokens"], size.get("rank", 0), _qkv_columns(size)
    table = tokens * (size.get("rotary_dim") or size["head_dim"])
    elements = 2 * tokens * columns + table + rank * (3 * tokens + columns)
    return Cost(elements * itemsize, (7 + 2 * rank) * tokens * columns)


def _qk_norm_backward_cases(size: Size, dtype: torch.dtype, device: torch.device) -> Inputs:
    shape = (size["tokens"], _qkv_columns(size))
    return {
        **_qk_norm_cases(size, dtype, device),
        "grad_TN": _normal(shape, dtype, device, size.get("pad", 0)),
        "weight_grad": size.get("weight_grad", False),
    }


def _qk_norm_backward_cost(size: Size, itemsize: int) -> Cost:
    tokens, rank, columns = size["tokens"], size.get("rank", 0), _qkv_columns(size)
    rotated = columns - size["kv_heads"] * size["head_dim"]
    table = tokens * (size.get("rotary_dim") or size["head_dim"])
    elements = 3 * tokens * rotated + table + rank * (2 * tokens + rotated)
    operations = 14 + 2 * rank + 2 * bool(size.get("weight_grad"))
    return Cost(elements * itemsize, operations * tokens * rotated)


def _qkv_columns(size: Size) -> int:
    columns: int = (size["heads"] + 2 * size["kv_heads"]) * size["head_dim"]
    return columns


# ---------------------------------------------------------------------- gated linear unit


def _gate_up_cases(size: Size, dtype: torch.dtype, device: torch.device) -> Inputs:
    tokens, rank, gated = size["tokens"], size.get("rank", 0), not size.get("plain", False)
    columns = (1 + gated) * size["inner"]
    return {
        "gate_up_TN": _normal((tokens, columns), dtype, device, size.get("pad", 0)),
        "activation": size.get("activation", "silu"),
        "gated": gated,
        "xa_TR": _shared(size, 1 + gated, dtype, device),
        "b_NR": _normal((columns, rank), dtype, device) if rank else None,
        "rank": rank,
        "scale": 0.5,
    }


def _glu_cases(size: Size, dtype: torch.dtype, device: torch.device) -> Inputs:
    tokens, inner, down = size["tokens"], size["inner"], size.get("down_rank", 0)
    return {
        **_gate_up_cases(size, dtype, device),
        "down_a_RI": _normal((down, inner), dtype, device, size.get("pad", 0)) if down else None,
        "down_u_TR": torch.zeros((tokens, down), dtype=dtype, device=device) if down else None,
    }


def _glu_cost(size: Size, itemsize: int) -> Cost:
    tokens, inner, rank, down = size["tokens"], size["inner"], size.get("rank", 0), size.get("down_rank", 0)
    parts = 1 if size.get("plain") else 2
    elements = (1 + parts) * tokens * inner + (parts * rank + down) * (tokens + inner)
    return Cost(elements * itemsize, tokens * inner * (4 + 4 * rank + 2 * down))


def _glu_backward_cases(size: Size, dtype: torch.dtype, device: torch.device) -> Inputs:
    tokens, inner, down = size["tokens"], size["inner"], size.get("down_rank", 0)
    return {
        **_gate_up_cases(size, dtype, device),
        "grad_act_TI": _normal((tokens, inner), dtype, device, size.get("pad", 0)),
        "down_dxa_TR": _normal((tokens, down), dtype, device) if down else None,
        "down_a_RI": _normal((down, inner), dtype, device, size.get("pad", 0)) if down else None,
    }


def _glu_backward_cost(size: Size, itemsize: int) -> Cost:
    tokens, inner, rank, down = size["tokens"], size["inner"], size.get("rank", 0), size.get("down_rank", 0)
    parts = 1 if size.get("plain") else 2
    elements = (
        (2 + 2 * parts) * tokens * inner + parts * rank * (2 * tokens + inner) + down * (tokens + inner)
    )
    return Cost(elements * itemsize, tokens * inner * (11 + 8 * rank + 2 * down))


# ---------------------------------------------------------------------- NF4


def _nf4_cases(size: Size, dtype: torch.dtype, device: torch.device) -> Inputs:
    rows, columns, blocksize = size["rows"], size["columns"], 64
    blocks = -(-rows * columns // blocksize)
    nested = None
    if size.get("nested"):
        nested = (
            torch.randint(0, 256, (blocks,), device=device, dtype=torch.uint8),
            torch.rand(-(-blocks // 256), device=device) + 0.5,
            torch.linspace(-1, 1, 256, device=device),
            torch.full((), 2.0, device=device),
            256,
        )
    return {
        "packed": torch.randint(0, 256, (-(-rows * columns // 2), 1), device=device, dtype=torch.uint8),
        "absmax": None if nested else torch.rand(blocks, device=device) + 0.1,
        "out_NK": torch.zeros((rows, columns + size.get("pad", 0)), device=device, dtype=dtype)[:, :columns],
        "code": torch.tensor(NF4_CODE, device=device),
        "blocksize": blocksize,
        "nested": nested,
    }


def _nf4_cost(size: Size, itemsize: int) -> Cost:
    elements = size["rows"] * size["columns"]
    absmax = elements // 64 + elements // 4096 if size.get("nested") else elements // 16
    return Cost(elements // 2 + absmax + elements * itemsize, elements)


# ---------------------------------------------------------------------- cross-entropy


def _logits_cases(size: Size, dtype: torch.dtype, device: torch.device) -> Inputs:
    rows, vocabulary = size["rows"], size["vocabulary"]
    return {
        "logits_CV": _normal((rows, vocabulary), dtype, device, size.get("pad", 0)).mul_(4),
        "targets_C": torch.randint(0, vocabulary, (rows,), device=device),
        "scale": size.get("scale", 1.0),
        "softcap": size.get("softcap"),
    }


def _softmax_gradient_cost(size: Size, itemsize: int) -> Cost:
    elements = size["rows"] * size["vocabulary"]
    return Cost(2 * elements * itemsize, 6 * elements)


def _logprob_cost(size: Size, itemsize: int) -> Cost:
    elements = size["rows"] * size["vocabulary"]
    return Cost(elements * itemsize, 3 * elements)


# ---------------------------------------------------------------------- AdamW


def _adamw_cases(size: Size, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Tensors of falling size, every second one in float32 at least with `mixed`; moments too with a `seed`."""
    indices = range(size["tensors"])
    other = torch.promote_types(dtype, torch.float32) if size.get("mixed") else dtype

    def normal(index: int) -> Tensor:
        elements = max(1, size["elements"] - index * size.get("less", 0))
        return _normal((elements,), other if index % 2 else dtype, device)

    def moment(index: int) -> Tensor:
        tensor = normal(index)
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if size.get("seed") else tensor

    return {
        "parameters": tuple(normal(index) for index in indices),
        "gradients": tuple(normal(index) for index in indices),
        "exp_avgs": tuple(moment(index).mul_(0.1) for index in indices),
        "exp_avg_sqs": tuple(moment(index).square_().add_(0.1) for index in indices),
        "steps": tuple(torch.tensor(float(index % 3), device=device) for index in indices),
        "groups": tuple(index % 2 for index in indices),
        "options": ((1e-2, 0.9, 0.999, 1e-8, 0.1), (3e-3, 0.0, 0.99, 1e-6, 0.0)),
        "max_norm": size.get("max_norm"),
        "seed": size.get("seed"),
    }


def _adamw_8bit_cases(size: Size, dtype: torch.dtype, device: torch.device) -> Inputs:
    """The tensors of `_adamw_cases` with moments of any code but 0 and 255."""
    inputs = _adamw_cases({"seed": 1, **size}, dtype, device)
    del inputs["exp_avg_sqs"]
    parameters = inputs["parameters"]
    for name in ("exp_avgs", "roots"):
        inputs[name] = tuple(
            torch.randint(1, 255, p.shape, dtype=torch.uint8, device=device) for p in parameters
        )
    for name in ("exp_avg_scales", "root_scales"):
        inputs[name] = tuple(torch.rand(scales_of(p.numel()), device=device) + 0.1 for p in parameters)
    return inputs


def _adamw_8bit_cost(size: Size, itemsize: int) -> Cost:
    elements = sum(max(1, size["elements"] - i * size.get("less", 0)) for i in range(size["tensors"]))
    return Cost(elements * (4 * itemsize + 4) + elements // 16, 100 * elements)


def _adamw_cost(size: Size, itemsize: int) -> Cost:
    elements = sum(max(1, size["elements"] - i * size.get("less", 0)) for i in range(size["tensors"]))
    # the gradient is read for the norm and for the update
    return Cost(8 * elements * itemsize, 16 * elements)


# ---------------------------------------------------------------------- the table

_LOGITS_SMALL: tuple[Size, ...] = (
    {"rows": 3, "vocabulary": 101},
    {"rows": 1, "vocabulary": 9000, "pad": 8},
    {"rows": 2, "vocabulary": 517, "scale": 0.25, "softcap": 4.0, "pad": 3},
    {"rows": 2, "vocabulary": 64, "scale": 2.0, "softcap": 30.0},
)
_LOGITS_LARGE: tuple[Size, ...] = (
    {"rows": 256, "vocabulary": 128256},
    {"rows": 128, "vocabulary": 262144, "softcap": 30.0},
    {"rows": 512, "vocabulary": 49152},
)
_ROPE_8B: Size = {"tokens": 8192, "heads": 32, "kv_heads": 8, "head_dim": 128}
_ROPE_SMALL: Size = {"tokens": 8192, "heads": 9, "kv_heads": 3, "head_dim": 64}

_ROPE_ODD: Size = {"tokens": 37, "heads": 4, "kv_heads": 1, "head_dim": 20, "pad": 3}
_QK_NORM_SMALL: tuple[Size, ...] = (
    {"tokens": 5, "heads": 3, "kv_heads": 1, "head_dim": 16},
    {**_ROPE_ODD, "rank": 5, "offset": 1.0},
    {**_ROPE_ODD, "rotary_dim": 12, "rank": 16, "shared": True},
    {**_ROPE_ODD, "full": True, "rank": 3},
    {**_ROPE_ODD, "full": True, "rotary_dim": 12},
    {**_ROPE_ODD, "interleaved": True, "spread": True},
    {"tokens": 33, "heads": 5, "kv_heads": 5, "head_dim": 64, "rank": 150},
    {"tokens": 17, "heads": 2, "kv_heads": 1, "head_dim": 256},
)
_QK_NORM_LARGE: tuple[Size, ...] = (
    {**_ROPE_8B, "rank": 16},
    _ROPE_8B,
    {**_ROPE_8B, "rank": 64},
    {"tokens": 8192, "heads": 16, "kv_heads": 8, "head_dim": 256, "offset": 1.0, "rank": 16},
    {"tokens": 8192, "heads": 40, "kv_heads": 8, "head_dim": 128, "full": True, "rank": 16},
)

CATALOG: dict[str, KernelRow] = {
    row.name: row
    for row in (
        KernelRow(
            name="rms_norm",
            op=rms_norm,
            reference=rms_norm_reference,
            cases=_rms_norm_cases,
            small=(
                {"tokens": 5, "width": 48},
                {"tokens": 1, "width": 7, "residual": True},
                {"tokens": 37, "width": 576, "residual": True, "pad": 5},
                {"tokens": 3, "width": 1500, "offset": 1.0, "pad": 16},
                {"tokens": 2, "width": 4096, "residual": True, "offset": 1.0},
                {"tokens": 3, "width": 1, "residual": True},
            ),
            large=(
                {"tokens": 8192, "width": 4096, "residual": True},
                {"tokens": 8192, "width": 4096},
                {"tokens": 8192, "width": 576, "residual": True},
                {"tokens": 2048, "width": 16384, "residual": True},
            ),
            tolerances=ROUNDED,
            cost=_rms_norm_cost,
        ),
        KernelRow(
            name="rms_norm_backward",
            op=rms_norm_backward,
            reference=rms_norm_backward_reference,
            cases=_rms_norm_backward_cases,
            small=(
                {"tokens": 5, "width": 48},
                {"tokens": 1, "width": 7, "add": True, "weight_grad": True},
                {"tokens": 37, "width": 576, "add": True, "recompute": True, "pad": 5},
                {"tokens": 67, "width": 96, "weight_grad": True, "recompute": True, "offset": 1.0},
                {"tokens": 9, "width": 1500, "add": True, "weight_grad": True, "pad": 16},
                {"tokens": 2, "width": 1, "add": True},
            ),
            large=(
                {"tokens": 8192, "width": 4096, "add": True},
                {"tokens": 8192, "width": 4096, "add": True, "recompute": True},
                {"tokens": 8192, "width": 4096, "add": True, "weight_grad": True},
                {"tokens": 8192, "width": 576, "add": True, "weight_grad": True},
                {"tokens": 2048, "width": 16384, "add": True, "weight_grad": True, "recompute": True},
            ),
            tolerances=ROUNDED,
            cost=_rms_norm_backward_cost,
        ),
        KernelRow(
            name="add_normed",
            op=add_normed,
            reference=add_normed_reference,
            cases=_add_normed_cases,
            small=(
                {"tokens": 5, "width": 48},
                {"tokens": 37, "width": 576, "pad": 5, "offset": 1.0},
                {"tokens": 3, "width": 1500, "pad": 16},
                {"tokens": 2, "width": 1},
            ),
            large=(
                {"tokens": 8192, "width": 3584, "offset": 1.0},
                {"tokens": 8192, "width": 4096},
            ),
            tolerances=ROUNDED,
            cost=_add_normed_cost,
        ),
        KernelRow(
            name="layer_norm",
            op=layer_norm,
            reference=layer_norm_reference,
            cases=_layer_norm_cases,
            small=(
                {"tokens": 5, "width": 48},
                {"tokens": 1, "width": 7, "bias": True},
                {"tokens": 37, "width": 576, "bias": True, "mean": 3.0},
                {"tokens": 3, "width": 1500, "pad": 16},
            ),
            large=(
                {"tokens": 8192, "width": 4096},
                {"tokens": 8192, "width": 3072, "bias": True},
            ),
            tolerances=ROUNDED,
            cost=_layer_norm_cost,
        ),
        KernelRow(
            name="layer_norm_backward",
            op=layer_norm_backward,
            reference=layer_norm_backward_reference,
            cases=_layer_norm_backward_cases,
            small=(
                {"tokens": 5, "width": 48},
                {"tokens": 1, "width": 7, "bias": True, "add": True, "weight_grad": True},
                {"tokens": 37, "width": 576, "bias": True, "add": True, "recompute": True, "mean": 3.0},
                {"tokens": 67, "width": 96, "weight_grad": True, "recompute": True},
                {"tokens": 9, "width": 1500, "add": True, "weight_grad": True, "pad": 16},
            ),
            large=(
                {"tokens": 8192, "width": 4096, "add": True},
                {"tokens": 8192, "width": 3072, "bias": True, "add": True, "recompute": True},
                {"tokens": 8192, "width": 3072, "bias": True, "add": True, "weight_grad": True},
            ),
            tolerances=ROUNDED,
            cost=_layer_norm_backward_cost,
        ),
        KernelRow(
            name="gather_rows",
            op=gather_rows,
            reference=gather_rows_reference,
            cases=_gather_rows_cases,
            small=(
                {"rows": 11, "columns": 48, "tokens": 5},
                {"rows": 97, "columns": 100, "tokens": 37, "pad": 3},
                {"rows": 3, "columns": 1, "tokens": 2},
                {"rows": 5, "columns": 8200, "tokens": 3, "pad": 8},
                {"rows": 7, "columns": 1500, "tokens": 1},
            ),
            large=(
                {"rows": 32_000, "columns": 8192, "tokens": 8192},
                {"rows": 32_000, "columns": 4096, "tokens": 8192},
                {"rows": 4096, "columns": 12_288, "tokens": 2048, "pad": 64},
                {"rows": 49_152, "columns": 576, "tokens": 8192},
            ),
            tolerances=EXACT,
            cost=_gather_rows_cost,
        ),
        KernelRow(
            name="add_residual",
            op=add_residual,
            reference=add_residual_reference,
            cases=_residual_cases,
            small=(
                {"tokens": 5, "columns": 48},
                {"tokens": 1, "columns": 7, "rank": 8},
                {"tokens": 67, "columns": 100, "rank": 16, "pad": 8},
                {"tokens": 33, "columns": 72, "rank": 80},
                {"tokens": 33, "columns": 72, "rank": 3, "scale": 0.22},
                {"tokens": 5, "columns": 48, "scale": 0.22, "pad": 3},
                {"tokens": 5, "columns": 48, "rank": 16, "alone": True},
            ),
            large=(
                {"tokens": 8192, "columns": 4096, "rank": 16},
                {"tokens": 8192, "columns": 4096, "rank": 64},
                {"tokens": 8192, "columns": 576, "rank": 16},
                {"tokens": 8192, "columns": 4096, "rank": 16, "scale": 0.22},
                {"tokens": 8192, "columns": 3584, "rank": 16, "alone": True},
            ),
            tolerances=ROUNDED_TWICE,
            cost=_residual_cost,
        ),
        KernelRow(
            name="rope_qkv_",
            op=rope_qkv_,
            reference=rope_qkv_reference_,
            cases=_rope_cases,
            small=(
                {"tokens": 5, "heads": 3, "kv_heads": 1, "head_dim": 16},
                {"tokens": 33, "heads": 4, "kv_heads": 2, "head_dim": 64, "inverse": True, "pad": 8},
                {"tokens": 1, "heads": 2, "kv_heads": 2, "head_dim": 20, "rotary_dim": 12},
                {
                    "tokens": 37,
                    "heads": 4,
                    "kv_heads": 1,
                    "head_dim": 20,
                    "rotary_dim": 12,
                    "rank": 5,
                    "pad": 3,
                },
                {"tokens": 3, "heads": 2, "kv_heads": 2, "head_dim": 32, "rank": 16},
                {"tokens": 2, "heads": 1, "kv_heads": 1, "head_dim": 80, "rank": 1},
                {"tokens": 4, "heads": 2, "kv_heads": 1, "head_dim": 16, "rank": 150},
                {**_ROPE_ODD, "interleaved": True, "rank": 5},
                {**_ROPE_ODD, "interleaved": True, "spread": True, "inverse": True},
                {**_ROPE_ODD, "rotary_dim": 12, "rank": 16, "shared": True},
            ),
            large=(
                _ROPE_8B,
                {**_ROPE_8B, "rank": 16},
                {**_ROPE_8B, "rank": 64},
                {**_ROPE_8B, "rank": 256},
                {**_ROPE_8B, "inverse": True},
                {**_ROPE_SMALL, "rank": 16},
                {**_ROPE_8B, "head_dim": 256, "rotary_dim": 64, "rank": 16},
                {**_ROPE_8B, "interleaved": True, "rotary_dim": 64, "rank": 16},
                {**_ROPE_8B, "interleaved": True, "spread": True, "inverse": True},
                {**_ROPE_8B, "rotary_dim": 96, "rank": 16, "shared": True},
            ),
            tolerances=ROUNDED,
            cost=_rope_cost,
            mutates=("qkv_TN",),
        ),
        KernelRow(
            name="qk_norm_rope",
            op=qk_norm_rope,
            reference=qk_norm_rope_reference,
            cases=_qk_norm_cases,
            small=_QK_NORM_SMALL,
            large=_QK_NORM_LARGE,
            tolerances=ROUNDED,
            cost=_qk_norm_cost,
        ),
        KernelRow(
            name="qk_norm_rope_backward_",
            op=qk_norm_rope_backward_,
            reference=qk_norm_rope_backward_reference_,
            cases=_qk_norm_backward_cases,
            small=(
                *_QK_NORM_SMALL,
                {"tokens": 67, "heads": 5, "kv_heads": 1, "head_dim": 16, "weight_grad": True},
                {**_ROPE_ODD, "rank": 5, "offset": 1.0, "rotary_dim": 12, "weight_grad": True},
                {**_ROPE_ODD, "full": True, "rotary_dim": 12, "weight_grad": True},
                {**_ROPE_ODD, "full": True, "interleaved": True, "weight_grad": True},
            ),
            large=(
                *_QK_NORM_LARGE,
                {**_ROPE_8B, "weight_grad": True},
                {**_ROPE_8B, "full": True, "weight_grad": True},
            ),
            tolerances=ROUNDED,
            cost=_qk_norm_backward_cost,
            mutates=("grad_TN",),
        ),
        KernelRow(
            name="glu",
            op=glu,
            reference=glu_reference,
            cases=_glu_cases,
            small=(
                {"tokens": 5, "inner": 48},
                {"tokens": 2, "inner": 1500, "activation": "gelu_tanh", "pad": 8},
                {"tokens": 1, "inner": 130, "activation": "gelu", "pad": 3},
                {"tokens": 37, "inner": 150, "rank": 5},
                {"tokens": 3, "inner": 200, "rank": 16, "activation": "gelu_tanh", "pad": 8},
                {"tokens": 1, "inner": 30, "rank": 150, "activation": "gelu"},
                {"tokens": 2, "inner": 1, "rank": 1},
                {"tokens": 5, "inner": 150, "plain": True, "activation": "gelu_tanh"},
                {"tokens": 37, "inner": 150, "plain": True, "activation": "gelu", "rank": 5},
                {"tokens": 37, "inner": 150, "shared": True, "rank": 5},
                {"tokens": 3, "inner": 30, "plain": True, "rank": 150},
                {"tokens": 37, "inner": 150, "rank": 5, "down_rank": 3},
                {"tokens": 67, "inner": 200, "rank": 16, "down_rank": 16, "pad": 8},
                {"tokens": 5, "inner": 150, "plain": True, "activation": "gelu_tanh", "down_rank": 16},
                {"tokens": 3, "inner": 30, "rank": 4, "down_rank": 150},
                {"tokens": 3, "inner": 30, "rank": 150, "down_rank": 4},
            ),
            large=(
                {"tokens": 8192, "inner": 14336},
                {"tokens": 8192, "inner": 14336, "rank": 16},
                {"tokens": 8192, "inner": 14336, "rank": 16, "down_rank": 16},
                {"tokens": 8192, "inner": 17920, "shared": True, "rank": 16, "down_rank": 16},
                {"tokens": 8192, "inner": 14336, "rank": 64, "down_rank": 64},
                {"tokens": 8192, "inner": 14336, "rank": 64},
                {"tokens": 2048, "inner": 14336, "rank": 256},
                {"tokens": 8192, "inner": 1536, "rank": 16},
                {"tokens": 8192, "inner": 14336, "activation": "gelu_tanh", "rank": 16},
                {"tokens": 8192, "inner": 17920, "shared": True, "rank": 16},
                {"tokens": 8192, "inner": 12288, "plain": True, "activation": "gelu_tanh", "rank": 16},
            ),
            tolerances=ROUNDED_TWICE,
            cost=_glu_cost,
            mutates=("down_u_TR",),
        ),
        KernelRow(
            name="glu_backward_",
            op=glu_backward_,
            reference=glu_backward_reference_,
            cases=_glu_backward_cases,
            small=(
                {"tokens": 5, "inner": 48},
                {"tokens": 2, "inner": 1500, "activation": "gelu_tanh", "pad": 8},
                {"tokens": 1, "inner": 130, "activation": "gelu", "pad": 3},
                {"tokens": 37, "inner": 150, "rank": 5, "down_rank": 9},
                {"tokens": 3, "inner": 700, "rank": 16, "activation": "gelu_tanh", "pad": 8},
                {"tokens": 33, "inner": 70, "down_rank": 100},
                {"tokens": 1, "inner": 30, "rank": 150, "down_rank": 1, "activation": "gelu"},
                {"tokens": 300, "inner": 64, "rank": 64, "down_rank": 64},
                {"tokens": 2, "inner": 1, "rank": 1, "down_rank": 1},
                {"tokens": 5, "inner": 150, "plain": True, "activation": "gelu_tanh"},
                {"tokens": 37, "inner": 150, "plain": True, "activation": "gelu", "rank": 5, "down_rank": 3},
                {"tokens": 37, "inner": 150, "shared": True, "rank": 5},
                {"tokens": 300, "inner": 64, "shared": True, "rank": 16, "down_rank": 16},
                {"tokens": 3, "inner": 30, "plain": True, "rank": 150},
                {"tokens": 3, "inner": 30, "shared": True, "rank": 150},
            ),
            large=(
                {"tokens": 8192, "inner": 14336},
                {"tokens": 8192, "inner": 14336, "rank": 16, "down_rank": 16},
                {"tokens": 8192, "inner": 14336, "rank": 64, "down_rank": 64},
                {"tokens": 2048, "inner": 14336, "rank": 256, "down_rank": 256},
                {"tokens": 512, "inner": 14336, "rank": 16, "down_rank": 16},
                {"tokens": 8192, "inner": 1536, "rank": 16, "down_rank": 16},
                {"tokens": 8192, "inner": 14336, "activation": "gelu_tanh", "rank": 16, "down_rank": 16},
                {"tokens": 8192, "inner": 17920, "shared": True, "rank": 16, "down_rank": 16},
                {
                    "tokens": 8192,
                    "inner": 12288,
                    "plain": True,
                    "activation": "gelu_tanh",
                    "rank": 16,
                    "down_rank": 16,
                },
            ),
            tolerances=ROUNDED_TWICE,
            cost=_glu_backward_cost,
            mutates=("gate_up_TN", "grad_act_TI"),
        ),
        KernelRow(
            name="dequantize_nf4",
            op=dequantize_nf4,
            reference=dequantize_nf4_reference,
            cases=_nf4_cases,
            small=(
                {"rows": 5, "columns": 64},
                {"rows": 67, "columns": 320, "nested": True},
                {"rows": 7, "columns": 72, "pad": 8},
                {"rows": 6, "columns": 30, "pad": 3},
                {"rows": 3, "columns": 21, "nested": True},
                {"rows": 1, "columns": 2},
            ),
            large=(
                {"rows": 28672, "columns": 4096},
                {"rows": 28672, "columns": 4096, "nested": True},
                {"rows": 6144, "columns": 4096, "pad": 64},
                {"rows": 4096, "columns": 14336, "pad": 64, "nested": True},
                {"rows": 3072, "columns": 576},
            ),
            tolerances={**ROUNDED, torch.float32: 1e-7},  # two roundings in float32 with `nested`, else one
            cost=_nf4_cost,
            mutates=("out_NK",),
        ),
        KernelRow(
            name="softmax_gradient_",
            op=softmax_gradient_,
            reference=softmax_gradient_reference_,
            cases=_logits_cases,
            small=_LOGITS_SMALL,
            large=_LOGITS_LARGE,
            tolerances=SOFTMAX,
            cost=_softmax_gradient_cost,
            mutates=("logits_CV",),
        ),
        KernelRow(
            name="logprob_",
            op=logprob_,
            reference=logprob_reference_,
            cases=_logits_cases,
            small=_LOGITS_SMALL,
            large=_LOGITS_LARGE,
            tolerances=SOFTMAX,
            cost=_logprob_cost,
        ),
        KernelRow(
            name="adamw_",
            op=adamw_,
            reference=adamw_reference_,
            cases=_adamw_cases,
            small=(
                {"tensors": 4, "elements": 1400, "less": 509, "max_norm": 1.0},
                {"tensors": 3, "elements": 5, "less": 2},
                {"tensors": 2, "elements": 2048, "less": 1008, "max_norm": 1e6},
                {"tensors": 3, "elements": 1025, "less": 512, "mixed": True, "max_norm": 0.25},
                {"tensors": 3, "elements": 1500, "less": 517, "seed": 3},
            ),
            large=(
                {"tensors": 420, "elements": 11664, "max_norm": 1.0},
                {"tensors": 420, "elements": 11664, "mixed": True, "max_norm": 1.0},
                {"tensors": 448, "elements": 11665, "less": 3, "max_norm": 1.0},
                {"tensors": 4, "elements": 2**26, "max_norm": 1.0},
                {"tensors": 4, "elements": 2**26, "max_norm": 1.0, "seed": 3},
            ),
            tolerances=ROUNDED,
            cost=_adamw_cost,
        ),
        KernelRow(
            name="adamw_8bit_",
            op=adamw_8bit_,
            reference=adamw_8bit_reference_,
            cases=_adamw_8bit_cases,
            small=(
                {"tensors": 3, "elements": 1400, "less": 509, "max_norm": 1.0},
                {"tensors": 3, "elements": 5, "less": 2},
                {"tensors": 3, "elements": 2048, "less": 1008, "mixed": True, "max_norm": 0.25},
            ),
            large=(
                {"tensors": 8, "elements": 4096 * 14336, "max_norm": 1.0},
                {"tensors": 16, "elements": 2**24, "less": 3, "max_norm": 1.0},
                {"tensors": 420, "elements": 11664, "max_norm": 1.0},
            ),
            tolerances=IN_8_BITS,
            cost=_adamw_8bit_cost,
        ),
        KernelRow(
            name="packed_attention",
            op=packed_attention,
            reference=packed_attention_reference,
            cases=attention_rows.attention_cases,
            small=attention_rows.SMALL,
            large=attention_rows.LARGE,
            tolerances=attention_rows.TOLERANCES,
            cost=lambda size, itemsize: Cost(*attention_rows.attention_work(size, itemsize)),
        ),
        KernelRow(
            name="packed_attention_backward",
            op=packed_attention_backward,
            reference=packed_attention_backward_reference,
            cases=attention_rows.attention_backward_cases,
            small=attention_rows.SMALL,
            large=attention_rows.LARGE,
            tolerances=attention_rows.TOLERANCES,
            cost=lambda size, itemsize: Cost(*attention_rows.attention_backward_work(size, itemsize)),
        ),
    )
}
"""Every kernel by name."""
