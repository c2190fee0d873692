"""Attention written out, document by document, for autograd: what every form of it is compared with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tunesmith.kernels.packed import Documents, Heads, Scores


def plain_attention(
    fused: Tensor, heads: Heads, lengths: tuple[int, ...], scores: Scores
) -> tuple[Tensor, Tensor]:
    """The output `[T, H·K]` and the log-sum-exp of base two `[H, T]`."""
    groups = heads.query // heads.key_value
    outputs, sums = [], []
    for part in fused.split(list(lengths)):
        q, k, v = heads.split(part)
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        s = torch.einsum("thk,shk->hts", q, k)
        s = s / math.sqrt(heads.size) if scores.scale is None else s * scores.scale
        if scores.softcap is not None:
            s = scores.softcap * torch.tanh(s / scores.softcap)
        # a query sees itself and the window − 1 keys before it
        place = range(len(part))
        window = scores.window or len(part)
        seen = torch.tensor([[0 <= i - j < window for j in place] for i in place], device=fused.device)
        s = s.masked_fill(~seen, float("-inf"))
        outputs.append(torch.einsum("hts,shk->thk", s.softmax(-1), v).flatten(1))
        sums.append(s.logsumexp(-1) / math.log(2))
    return torch.cat(outputs), torch.cat(sums, 1)


def packed_attention(
    *, fused_TN: Tensor, heads: Heads, documents: Documents, scores: Scores, **_: int
) -> list[Tensor]:
    return list(plain_attention(fused_TN, heads, documents.lengths, scores))


def packed_attention_backward(
    *,
    grad_TN: Tensor,
    fused_TN: Tensor,
    heads: Heads,
    documents: Documents,
    scores: Scores,
    **_: object,
) -> list[Tensor]:
    out, _lse = plain_attention(fused_TN.requires_grad_(), heads, documents.lengths, scores)
    return list(torch.autograd.grad(out, fused_TN, grad_TN))
