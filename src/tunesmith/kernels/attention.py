"""Packed attention on one fused buffer, forward and backward by hand, behind one table of backends.

The buffer holds `[q heads | k heads | v heads]` of every token, as one GEMM wrote it; backends read it with
strides and write the gradient into a buffer of the same layout, so nothing is split, transposed or joined.

| backend | what it is | where |
|---|---|---|
| cudnn_equal | cuDNN's graph API (`nvidia-cudnn-frontend`), dense | documents of equal length, sm_90 and later |
| cudnn_dense | cuDNN through torch's own operator, which joins the gradient afterwards | the same without windows |
| cudnn_ragged | cuDNN's graph API with ragged offsets | documents of any lengths, sm_90 and later |
| flash | torch's variable-length FlashAttention-2 | 16-bit types, heads up to 256 |
| triton | kernels of our own (`attention_triton`) | soft caps, float32, and what the others leave out |
| sdpa | one `scaled_dot_product_attention` a document | everywhere; the reference |

All take any scale, and all but `cudnn_dense` sliding windows. Soft caps are in the last two.

Measured on one H100 at 16,384 tokens (32 heads, 8 key/value heads, 128 wide), forward / forward and backward in
TFLOP/s of the true causal cost: 4 documents of 4,096: ragged 570 / 477, dense 606 / 500, flash 308 / 278; 32
documents of 512 on average: ragged 322 / 220, flash 155 / 143. Hence the order of the table.

Shape suffixes: T tokens, N columns of the fused buffer, H query heads, G key/value heads, K head size,
B documents of a dense batch, M length of each of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from tunesmith.kernels.attention_cudnn import (
    compute_capability,
    cudnn_computes,
    equal_backward,
    equal_fits,
    equal_forward,
    ragged_backward,
    ragged_fits,
    ragged_forward,
)
from tunesmith.kernels.attention_triton import triton_backward, triton_fits, triton_forward
from tunesmith.kernels.launch import accumulation_dtype
from tunesmith.kernels.packed import Backend, Documents, Heads, Saved, Scores, takes_half

__all__ = [
    "BACKENDS",
    "Documents",
    "Heads",
    "Scores",
    "attention_backward",
    "attention_forward",
    "choose_backend",
    "switched_off",
]


# ---------------------------------------------------------------------- reference


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """Boolean `[length, length]`: the keys that a query sees, at most `window` with its own."""
    seen = torch.ones(length, length, dtype=torch.bool, device=device)
    return seen.tril().triu(1 - window)


def _one_document(q_1HMK: Tensor, k_1GMK: Tensor, v_1GMK: Tensor, factor: float, scores: Scores) -> Tensor:
    length, grouped = q_1HMK.shape[2], q_1HMK.shape[1] != k_1GMK.shape[1]
    hides = scores.window is not None and scores.window < length
    mask = _window_mask(length, scores.window or length, q_1HMK.device) if hides or scores.softcap else None
    if scores.softcap is None:
        return scaled_dot_product_attention(
            q_1HMK, k_1GMK, v_1GMK, mask, is_causal=mask is None, scale=factor, enable_gqa=grouped
        )
    assert mask is not None
    # in 16 bits a score near the cap of 50 would be off by 0.1
    wide = accumulation_dtype(q_1HMK.dtype)
    q, k, v = (part.to(wide) for part in (q_1HMK, k_1GMK, v_1GMK))
    k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (k, v))
    capped = scores.softcap * torch.tanh(q @ k.mT * (factor / scores.softcap))
    output: Tensor = capped.masked_fill(~mask, float("-inf")).softmax(-1) @ v
    return output.to(q_1HMK.dtype)


def _per_document(fused_TN: Tensor, heads: Heads, lengths: tuple[int, ...], scores: Scores) -> Tensor:
    if fused_TN.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("attention by document lengths on the host would be recorded for one batch only")
    outputs, start = [], 0
    for length in filter(None, lengths):
        parts = heads.split(fused_TN[start : start + length])
        q, k, v = (part.transpose(0, 1)[None] for part in parts)
        outputs.append(_one_document(q, k, v, scores.factor(heads), scores)[0].transpose(0, 1))
        start += length
    return torch.cat(outputs).flatten(1)


def _sdpa_forward(
    fused_TN: Tensor, heads: Heads, documents: Documents, scores: Scores, room: int
) -> tuple[Tensor, Saved]:
    output = _per_document(fused_TN, heads, documents.lengths, scores)
    return pad(output, (0, room))[:, : output.shape[1]], ()


def _sdpa_backward(
    grad: Tensor,
    fused_TN: Tensor,
    _output: Tensor,
    _saved: Saved,
    heads: Heads,
    documents: Documents,
    scores: Scores,
    room: int,
) -> Tensor:
    leaf_TN = fused_TN.detach().requires_grad_()
    with torch.enable_grad():
        output = _per_document(leaf_TN, heads, documents.lengths, scores)
    (grad_TN,) = torch.autograd.grad(output, leaf_TN, grad)
    return pad(grad_TN, (0, room))[:, : heads.columns] if room else grad_TN


def _side_by_side(parts: tuple[Tensor, Tensor, Tensor], room: int) -> Tensor:
    """Gradients of q, k and v in one buffer, each `[T, heads · K]`."""
    if not room:
        return torch.cat(parts, dim=1)
    widths = [part.shape[1] for part in parts]
    buffer = parts[0].new_empty(parts[0].shape[0], sum(widths) + room)[:, : sum(widths)]
    for columns, part in zip(buffer.split(widths, dim=1), parts, strict=True):
        columns.copy_(part)
    return buffer


# ---------------------------------------------------------------------- torch's FlashAttention-2


def _flash_fits(fused_TN: Tensor, heads: Heads, _documents: Documents, scores: Scores) -> bool:
    if scores.softcap is not None or not takes_half(fused_TN, heads, 256):
        return False
    card = compute_capability()
    # its backward of heads between 192 and 224 wants more shared memory than consumer cards have
    return card >= (8, 0) and (not 192 < heads.size <= 224 or (card[1] == 0 and card[0] < 12))


def _flash_options(heads: Heads, scores: Scores) -> dict[str, Any]:
    # a window counts the query's own key, its left end does not
    left = -1 if scores.window is None else scores.window - 1
    return {"scale": scores.factor(heads), "window_size_left": left, "window_size_right": 0}


def _flash_forward(
    fused_TN: Tensor, heads: Heads, documents: Documents, scores: Scores, _room: int
) -> tuple[Tensor, Saved]:
    q, k, v = heads.split(fused_TN)
    cu, longest = documents.cu_seqlens, documents.longest
    out, lse, state, offset, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu, cu, longest, longest, 0.0, scores.window is None, False, **_flash_options(heads, scores)
    )
    return out.flatten(1), (lse, state, offset)


def _flash_backward(
    grad: Tensor,
    fused_TN: Tensor,
    output: Tensor,
    saved: Saved,
    heads: Heads,
    documents: Documents,
    scores: Scores,
    room: int,
) -> Tensor:
    q, k, v = heads.split(fused_TN)
    lse, state, offset = saved
    cu, longest = documents.cu_seqlens, documents.longest
    shape = (heads.query, heads.size)
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        grad.unflatten(-1, shape), q, k, v, output.unflatten(-1, shape), lse, cu, cu, longest, longest,
        0.0, scores.window is None, state, offset, **_flash_options(heads, scores),
    )  # fmt: skip
    return _side_by_side((dq.flatten(1), dk.flatten(1), dv.flatten(1)), room)


# ---------------------------------------------------------------------- cuDNN through torch


def _dense_fits(fused_TN: Tensor, heads: Heads, documents: Documents, scores: Scores) -> bool:
    # below 64 tokens a document the batch of tiny matrices is slower than one packed row
    long_enough = documents.equal and documents.lengths[0] >= 64
    return long_enough and scores.window is None and cudnn_computes(fused_TN, heads, scores)


def _to_dense(part_THK: Tensor, length: int) -> Tensor:
    dense_BHMK: Tensor = part_THK.unflatten(0, (-1, length)).transpose(1, 2)
    return dense_BHMK


def _dense_forward(
    fused_TN: Tensor, heads: Heads, documents: Documents, scores: Scores, _room: int
) -> tuple[Tensor, Saved]:
    q, k, v = (_to_dense(part, documents.lengths[0]) for part in heads.split(fused_TN))
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, True, False, scale=scores.factor(heads)
    )
    out: Tensor = found[0]
    lse, state, offset = found[1], found[6], found[7]
    rows: Tensor = out.transpose(1, 2).flatten(0, 1).flatten(1)
    return rows, (lse, state, offset)


def _dense_backward(
    grad: Tensor,
    fused_TN: Tensor,
    output: Tensor,
    saved: Saved,
    heads: Heads,
    documents: Documents,
    scores: Scores,
    room: int,
) -> Tensor:
    length = documents.lengths[0]
    q, k, v = (_to_dense(part, length) for part in heads.split(fused_TN))
    lse, state, offset = saved
    shape = (heads.query, heads.size)
    # the operator misreads a gradient with other strides than the output's: both are contiguous [T, H·K] here
    grad_out, out = (_to_dense(part.contiguous().unflatten(-1, shape), length) for part in (grad, output))
    dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        grad_out,
        q,
        k,
        v,
        out,
        lse,
        state,
        offset,
        None,
        None,
        None,
        length,
        length,
        0.0,
        True,
        scale=scores.factor(heads),
    )
    dq, dk, dv = (part.transpose(1, 2).flatten(0, 1).flatten(1) for part in (dq, dk, dv))
    return _side_by_side((dq, dk, dv), room)


# ---------------------------------------------------------------------- the table


BACKENDS: dict[str, Backend] = {
    "cudnn_equal": Backend(equal_fits, equal_forward, equal_backward),
    "cudnn_dense": Backend(_dense_fits, _dense_forward, _dense_backward),
    "cudnn_ragged": Backend(ragged_fits, ragged_forward, ragged_backward),
    "flash": Backend(_flash_fits, _flash_forward, _flash_backward),
    "triton": Backend(triton_fits, triton_forward, triton_backward),
    "sdpa": Backend(lambda *_: True, _sdpa_forward, _sdpa_backward),
}
"""In order of preference; `choose_backend` takes the first that fits."""

switched_off: set[str] = set()
"""Backends that failed the start-up check on this card; `choose_backend` passes over them."""

ALL_SCORES = Scores()
"""Scores as most families make them: 1/sqrt(K), no window, no cap."""


def choose_backend(fused_TN: Tensor, heads: Heads, documents: Documents, scores: Scores | None = None) -> str:
    """The fastest row of `BACKENDS` that computes this exactly."""
    wanted = (scores or ALL_SCORES).within(documents)
    return next(
        name
        for name, row in BACKENDS.items()
        if name not in switched_off and row.fits(fused_TN, heads, documents, wanted)
    )


def attention_forward(
    fused_TN: Tensor,
    heads: Heads,
    documents: Documents,
    *,
    scores: Scores | None = None,
    backend: str | None = None,
    room: int = 0,
) -> tuple[Tensor, str, Saved]:
    """Causal attention within each document of a packed row.

    Args:
        fused_TN: `[T, (H + 2G)·K]`, q, k and v side by side; rows may be further apart than they are wide.
        scores: scale, window and soft cap; None is a scale of 1/sqrt(K) alone.
        room: columns of undefined content that a row of the output shall have beyond its end; a backend that writes
            into memory of its own leaves none.

    Returns:
        The output `[T, H·K]`, the backend that computed it, and what its backward needs.
    """
    wanted = (scores or ALL_SCORES).within(documents)
    name = backend or choose_backend(fused_TN, heads, documents, wanted)
    output, saved = BACKENDS[name].forward(fused_TN, heads, documents, wanted, room)
    return output, name, saved


def attention_backward(
    grad: Tensor,
    fused_TN: Tensor,
    output: Tensor,
    saved: Saved,
    backend: str,
    heads: Heads,
    documents: Documents,
    *,
    scores: Scores | None = None,
    room: int = 0,
) -> Tensor:
    """Gradient of the fused buffer `[T, (H + 2G)·K]`, given that of the output `[T, H·K]`.

    Args:
        scores: those of the forward pass.
        room: columns of undefined content that each of its rows has beyond its end, for a caller who fills them.
    """
    wanted = (scores or ALL_SCORES).within(documents)
    return BACKENDS[backend].backward(grad, fused_TN, output, saved, heads, documents, wanted, room)
