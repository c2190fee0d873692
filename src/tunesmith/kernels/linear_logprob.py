"""Log-probabilities and cross-entropy of chosen tokens straight from hidden states: logits never exist in full.

For S supervised positions and a vocabulary of V, stock heads hold `[S, V]` logits, their float32 copy and
their gradient: 6 GiB for 8,192 tokens of a 128k vocabulary. Here the head runs over chunks of rows and only
one chunk of logits lives at a time. With z = scale · (h Wᵀ + b), optionally capped by z ← c · tanh(z / c):

    logprob_s    = z_s[target_s] − logsumexp(z_s)
    ∂logprob_s/∂z = onehot(target_s) − softmax(z_s)          (· (1 − (z/c)²) through the cap, · scale)

`linear_logprob` recomputes the logits of each chunk in backward. `linear_cross_entropy` knows in its forward
what the upstream gradient is up to one scalar, so it computes the gradients there and then: one GEMM fewer.
Rejected: keeping the logits in 16 bits between the passes, which still costs S · V.

Rows are weighted after the GEMMs, in the accumulation type, because a weight such as 1/30,000 times a small
probability is below what float16 can hold.

Shape suffixes: S supervised tokens, D hidden size, V vocabulary, C rows of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tunesmith.kernels.cross_entropy import logprob_, softmax_gradient_

CHUNK_BYTES = 256 * 2**20
"""Upper bound of one chunk of logits: 1,024 rows of a 128k vocabulary in 16 bits, enough rows for both GEMMs of a
chunk to fill an H100. On CPU the smaller bound below is faster, because a chunk fits the caches better."""
CHUNK_BYTES_CPU = 16 * 2**20


class _Head(NamedTuple):
    """What turns hidden states into logits."""

    weight_VD: Tensor
    bias_V: Tensor | None
    scale: float
    softcap: float | None


def _accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _chunks(hidden_SD: Tensor, vocabulary: int) -> Iterator[slice]:
    on_cpu = hidden_SD.device.type == "cpu"
    rows = (CHUNK_BYTES_CPU if on_cpu else CHUNK_BYTES) // (_logits_dtype(hidden_SD).itemsize * vocabulary)
    rows = rows // 128 * 128 if rows >= 128 else max(16, rows)
    for start in range(0, hidden_SD.shape[0], rows):
        yield slice(start, min(start + rows, hidden_SD.shape[0]))


def _logits_dtype(hidden_SD: Tensor) -> torch.dtype:
    """On a GPU logits stay in the type of the GEMM, as in every stock head, and the kernel computes in float32."""
    return hidden_SD.dtype if hidden_SD.is_cuda else _accumulation_dtype(hidden_SD)


def _logits(hidden_CD: Tensor, head: _Head) -> Tensor:
    """h Wᵀ + b of a chunk `[C, V]`."""
    logits_CV = (hidden_CD @ head.weight_VD.T).to(_logits_dtype(hidden_CD))
    if head.bias_V is not None:
        logits_CV += head.bias_V
    return logits_CV


class _Gradients:
    """Accumulates the gradients of hidden states, weight and bias over chunks."""

    def __init__(self, hidden_SD: Tensor, head: _Head, needed: tuple[bool, bool, bool]) -> None:
        accumulate = _accumulation_dtype(hidden_SD)
        weight_VD, bias_V = head.weight_VD, head.bias_V
        self.hidden_SD = torch.empty_like(hidden_SD, dtype=accumulate) if needed[0] else None
        self.weight_VD = torch.zeros_like(weight_VD, dtype=accumulate) if needed[1] else None
        self.bias_V = torch.zeros_like(bias_V, dtype=accumulate) if needed[2] and bias_V is not None else None

    def add(self, rows: slice, hidden_CD: Tensor, grad_CV: Tensor, row_weight_C: Tensor, head: _Head) -> None:
        """Add a chunk: `grad_CV` unweighted, `row_weight_C` the upstream gradient of each row."""
        narrow_CV = grad_CV.to(hidden_CD.dtype)
        if self.hidden_SD is not None:
            # ∂/∂h_s = g_s · (∂logprob/∂z)_s W
            self.hidden_SD[rows] = (narrow_CV @ head.weight_VD) * row_weight_C[:, None]
        if self.weight_VD is not None:
            # ∂/∂W = Σ_s g_s · (∂logprob/∂z)_s ⊗ h_s, the rows of h scaled by g_s / max|g| to stay in range
            largest = row_weight_C.abs().amax().clamp_min(torch.finfo(row_weight_C.dtype).tiny)
            scaled_CD = (hidden_CD * (row_weight_C / largest)[:, None]).to(hidden_CD.dtype)
            self.weight_VD += (narrow_CV.T @ scaled_CD).to(self.weight_VD.dtype) * largest
        if self.bias_V is not None:
            self.bias_V += row_weight_C @ grad_CV.to(row_weight_C.dtype)

    def scaled(self, factor: Tensor, like: _Head, hidden_dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """The three gradients times `factor`, in the types of what they belong to."""
        hidden = None if self.hidden_SD is None else (self.hidden_SD * factor).to(hidden_dtype)
        weight = None if self.weight_VD is None else (self.weight_VD * factor).to(like.weight_VD.dtype)
        bias = (
            None
            if self.bias_V is None or like.bias_V is None
            else (self.bias_V * factor).to(like.bias_V.dtype)
        )
        return hidden, weight, bias


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_SD: Tensor, targets_S: Tensor, *head_parts: Any) -> Tensor:
        head = _Head(*head_parts)
        logprob_S = hidden_SD.new_empty(hidden_SD.shape[0], dtype=_accumulation_dtype(hidden_SD))
        for rows in _chunks(hidden_SD, head.weight_VD.shape[0]):
            logits_CV = _logits(hidden_SD[rows], head)
            logprob_S[rows], _ = logprob_(logits_CV, targets_S[rows], scale=head.scale, softcap=head.softcap)
        ctx.save_for_backward(hidden_SD, targets_S, head.weight_VD, head.bias_V)
        ctx.scale, ctx.softcap = head.scale, head.softcap
        return logprob_S

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_S,) = grads
        hidden_SD, targets_S, weight_VD, bias_V = ctx.saved_tensors
        head = _Head(weight_VD, bias_V, ctx.scale, ctx.softcap)
        needed = ctx.needs_input_grad
        total = _Gradients(hidden_SD, head, (needed[0], needed[2], needed[3]))
        for rows in _chunks(hidden_SD, weight_VD.shape[0]):
            grad_CV = _logits(hidden_SD[rows], head)
            softmax_gradient_(grad_CV, targets_S[rows], scale=head.scale, softcap=head.softcap)
            total.add(rows, hidden_SD[rows], grad_CV, grad_S[rows], head)
        hidden, weight, bias = total.scaled(grad_S.new_ones(()), head, hidden_SD.dtype)
        return hidden, None, weight, bias, None, None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_SD: Tensor,
        targets_S: Tensor,
        weights_S: Tensor,
        needs: tuple[bool, bool, bool],
        *parts: Any,
    ) -> Tensor:
        head = _Head(*parts)
        accumulate = _accumulation_dtype(hidden_SD)
        weights_S = weights_S.to(accumulate)
        loss = hidden_SD.new_zeros((), dtype=accumulate)
        total = _Gradients(hidden_SD, head, needs)
        for rows in _chunks(hidden_SD, head.weight_VD.shape[0]):
            logits_CV = _logits(hidden_SD[rows], head)
            if any(needs):  # the logits become their gradient in place
                logprob_C = softmax_gradient_(
                    logits_CV, targets_S[rows], scale=head.scale, softcap=head.softcap
                )
                total.add(rows, hidden_SD[rows], logits_CV, -weights_S[rows], head)
            else:
                logprob_C, _ = logprob_(logits_CV, targets_S[rows], scale=head.scale, softcap=head.softcap)
            loss -= (weights_S[rows] * logprob_C).sum()
        ctx.total, ctx.head, ctx.hidden_dtype = total, head, hidden_SD.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.total.scaled(grads[0], ctx.head, ctx.hidden_dtype)
        return hidden, None, None, None, weight, bias, None, None


def linear_logprob(
    hidden_SD: Tensor,
    weight_VD: Tensor,
    targets_S: Tensor,
    *,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Log-probability of one target token per hidden state.

    Args:
        hidden_SD: hidden states in any floating type; the GEMMs run in it.
        weight_VD: the head's weight, in the type of `hidden_SD`.
        targets_S: int64 token ids.
        bias_V: the head's bias.
        scale: factor on the logits (Cohere's `logit_scale`; Granite divides).
        softcap: cap c of z ← c · tanh(z / c) (Gemma 2).

    Returns:
        float32 `[S]` (float64 for float64 input), differentiable in hidden states, weight and bias.
    """
    with torch.autocast(hidden_SD.device.type, enabled=False):
        result: Tensor = _LinearLogprob.apply(hidden_SD, targets_S, weight_VD, bias_V, scale, softcap)  # type: ignore[no-untyped-call]
    return result


def linear_cross_entropy(
    hidden_SD: Tensor,
    weight_VD: Tensor,
    targets_S: Tensor,
    weights_S: Tensor,
    *,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Σ_s −weights_s · logprob_s, with gradients computed in the forward pass.

    Args:
        weights_S: weight of each target in the sum; carries the division by the global token count.

    The other arguments are those of `linear_logprob`. Returns a scalar in float32 (float64 for float64 input).
    """
    needs = (
        hidden_SD.requires_grad,
        weight_VD.requires_grad,
        bias_V is not None and bias_V.requires_grad,
    )
    if not torch.is_grad_enabled():
        needs = (False, False, False)
    with torch.autocast(hidden_SD.device.type, enabled=False):
        result: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden_SD, targets_S, weights_S, needs, weight_VD, bias_V, scale, softcap
        )
    return result
