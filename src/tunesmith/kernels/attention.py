"""Packed attention on one fused buffer, forward and backward by hand, behind one table of backends.

The buffer holds `[q heads | k heads | v heads]` of every token, as one GEMM wrote it; backends read it with
strides and write the gradient into a buffer of the same layout, so nothing is split, transposed or joined.

| backend | what it is | where |
|---|---|---|
| cudnn_equal | cuDNN's graph API (`nvidia-cudnn-frontend`), dense | documents of equal length |
| cudnn_dense | cuDNN through torch's own operator, which joins the gradient afterwards | the same |
| cudnn_ragged | cuDNN's graph API with ragged offsets | documents of any lengths |
| flash | torch's variable-length FlashAttention-2 | 16-bit types, head size up to 256 |
| sdpa | one `scaled_dot_product_attention` a document | everywhere; the reference |

Measured on one H100 at 16,384 tokens (32 heads, 8 key/value heads, 128 wide), forward / forward and backward in
TFLOP/s of the true causal cost: 4 documents of 4,096: ragged 570 / 477, dense 606 / 500, flash 308 / 278; 32
documents of 512 on average: ragged 322 / 220, flash 155 / 143. Hence the order of the table.

Shape suffixes: T tokens, N columns of the fused buffer, H query heads, G key/value heads, K head size,
B documents of a dense batch, M length of each of them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from tunesmith.kernels.attention_cudnn import (
    cudnn_computes,
    equal_backward,
    equal_fits,
    equal_forward,
    ragged_backward,
    ragged_fits,
    ragged_forward,
)
from tunesmith.kernels.packed import Backend, Documents, Heads, Saved, takes_half

__all__ = [
    "BACKENDS",
    "Documents",
    "Heads",
    "attention_backward",
    "attention_forward",
    "choose_backend",
    "switched_off",
]


# ---------------------------------------------------------------------- reference


def _per_document(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, heads: Heads, lengths: tuple[int, ...]
) -> Tensor:
    if q_THK.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("attention by document lengths on the host would be recorded for one batch only")
    outputs, start = [], 0
    for length in filter(None, lengths):
        rows = slice(start, start + length)
        q, k, v = (part[rows].transpose(0, 1)[None] for part in (q_THK, k_TGK, v_TGK))
        out = scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=heads.factor, enable_gqa=heads.query != heads.key_value
        )
        outputs.append(out[0].transpose(0, 1))
        start += length
    return torch.cat(outputs).flatten(1)


def _sdpa_forward(fused_TN: Tensor, heads: Heads, documents: Documents, room: int) -> tuple[Tensor, Saved]:
    output = _per_document(*heads.split(fused_TN), heads, documents.lengths)
    return pad(output, (0, room))[:, : output.shape[1]], ()


def _sdpa_backward(
    grad: Tensor,
    fused_TN: Tensor,
    _output: Tensor,
    _saved: Saved,
    heads: Heads,
    documents: Documents,
    room: int,
) -> Tensor:
    leaf_TN = fused_TN.detach().requires_grad_()
    with torch.enable_grad():
        output = _per_document(*heads.split(leaf_TN), heads, documents.lengths)
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


def _flash_fits(fused_TN: Tensor, heads: Heads, _documents: Documents) -> bool:
    return takes_half(fused_TN, heads, 256)


def _flash_forward(fused_TN: Tensor, heads: Heads, documents: Documents, _room: int) -> tuple[Tensor, Saved]:
    q, k, v = heads.split(fused_TN)
    cu, longest = documents.cu_seqlens, documents.longest
    out, lse, state, offset, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu, cu, longest, longest, 0.0, True, False, scale=heads.factor
    )
    return out.flatten(1), (lse, state, offset)


def _flash_backward(
    grad: Tensor,
    fused_TN: Tensor,
    output: Tensor,
    saved: Saved,
    heads: Heads,
    documents: Documents,
    room: int,
) -> Tensor:
    q, k, v = heads.split(fused_TN)
    lse, state, offset = saved
    cu, longest = documents.cu_seqlens, documents.longest
    shape = (heads.query, heads.size)
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        grad.unflatten(-1, shape), q, k, v, output.unflatten(-1, shape), lse, cu, cu, longest, longest,
        0.0, True, state, offset, scale=heads.factor,
    )  # fmt: skip
    return _side_by_side((dq.flatten(1), dk.flatten(1), dv.flatten(1)), room)


# ---------------------------------------------------------------------- cuDNN through torch


def _dense_fits(fused_TN: Tensor, heads: Heads, documents: Documents) -> bool:
    # below 64 tokens a document the batch of tiny matrices is slower than one packed row
    return documents.equal and documents.lengths[0] >= 64 and cudnn_computes(fused_TN, heads)


def _to_dense(part_THK: Tensor, length: int) -> Tensor:
    dense_BHMK: Tensor = part_THK.unflatten(0, (-1, length)).transpose(1, 2)
    return dense_BHMK


def _dense_forward(fused_TN: Tensor, heads: Heads, documents: Documents, _room: int) -> tuple[Tensor, Saved]:
    q, k, v = (_to_dense(part, documents.lengths[0]) for part in heads.split(fused_TN))
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, True, False, scale=heads.factor
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
        scale=heads.factor,
    )
    dq, dk, dv = (part.transpose(1, 2).flatten(0, 1).flatten(1) for part in (dq, dk, dv))
    return _side_by_side((dq, dk, dv), room)


# ---------------------------------------------------------------------- the table


BACKENDS: dict[str, Backend] = {
    "cudnn_equal": Backend(equal_fits, equal_forward, equal_backward),
    "cudnn_dense": Backend(_dense_fits, _dense_forward, _dense_backward),
    "cudnn_ragged": Backend(ragged_fits, ragged_forward, ragged_backward),
    "flash": Backend(_flash_fits, _flash_forward, _flash_backward),
    "sdpa": Backend(lambda *_: True, _sdpa_forward, _sdpa_backward),
}
"""In order of preference; `choose_backend` takes the first that fits."""

switched_off: set[str] = set()
"""Backends that failed the start-up check on this card; `choose_backend` passes over them."""


def choose_backend(fused_TN: Tensor, heads: Heads, documents: Documents) -> str:
    """The fastest row of `BACKENDS` that computes this exactly."""
    return next(
        name
        for name, row in BACKENDS.items()
        if name not in switched_off and row.fits(fused_TN, heads, documents)
    )


def attention_forward(
    fused_TN: Tensor, heads: Heads, documents: Documents, *, backend: str | None = None, room: int = 0
) -> tuple[Tensor, str, Saved]:
    """Causal attention within each document of a packed row.

    Args:
        fused_TN: `[T, (H + 2G)·K]`, q, k and v side by side; rows may be further apart than they are wide.
        room: columns of undefined content that a row of the output shall have beyond its end; a backend that writes
            into memory of its own leaves none.

    Returns:
        The output `[T, H·K]`, the backend that computed it, and what its backward needs.
    """
    name = backend or choose_backend(fused_TN, heads, documents)
    output, saved = BACKENDS[name].forward(fused_TN, heads, documents, room)
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
    room: int = 0,
) -> Tensor:
    """Gradient of the fused buffer `[T, (H + 2G)·K]`, given that of the output `[T, H·K]`.

    Args:
        room: columns of undefined content that each of its rows has beyond its end, for a caller who fills them.
    """
    return BACKENDS[backend].backward(grad, fused_TN, output, saved, heads, documents, room)
