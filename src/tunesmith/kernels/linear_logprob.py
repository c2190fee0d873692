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
probability is below what float16 can hold. The gradient of a head that trains is added up over the chunks by the
GEMMs themselves, in the accumulation type; its rows are weighted before, over the largest weight, and stay in range.

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


def _add_product_(total_VD: Tensor, left_VC: Tensor, right_CD: Tensor) -> None:
    """total += left · right, on CUDA within the GEMM: a product of its own would be as large as the total."""
    if left_VC.is_cuda and left_VC.dtype != total_VD.dtype:
        torch.addmm(total_VD, left_VC, right_CD, out_dtype=total_VD.dtype, out=total_VD)
    elif left_VC.dtype == total_VD.dtype:
        total_VD.addmm_(left_VC, right_CD)
    else:
        total_VD += left_VC @ right_CD


class _Gradients:
    """Accumulates the gradients of hidden states, weight and bias over chunks.

    Args:
        needed: which of the three are wanted.
        row_weight_S: the upstream gradient of every row.
    """

    def __init__(
        self, hidden_SD: Tensor, head: _Head, needed: tuple[bool, bool, bool], row_weight_S: Tensor
    ) -> None:
        accumulate = _accumulation_dtype(hidden_SD)
        weight_VD, bias_V = head.weight_VD, head.bias_V
        self.hidden_SD = torch.empty_like(hidden_SD, dtype=accumulate) if needed[0] else None
        self.weight_VD = torch.zeros_like(weight_VD, dtype=accumulate) if needed[1] else None
        self.bias_V = torch.zeros_like(bias_V, dtype=accumulate) if needed[2] and bias_V is not None else None
        self._row_weight_S = row_weight_S
        self._largest: Tensor | None = None
        if self.weight_VD is not None and row_weight_S.numel():
            smallest = torch.finfo(row_weight_S.dtype).tiny
            self._largest = row_weight_S.abs().amax().clamp_min(smallest)

    def add(self, rows: slice, hidden_CD: Tensor, grad_CV: Tensor, head: _Head) -> None:
        """Add a chunk of rows, `grad_CV` unweighted."""
        row_weight_C = self._row_weight_S[rows]
        narrow_CV = grad_CV.to(hidden_CD.dtype)
        if self.hidden_SD is not None:
            # ∂/∂h_s = g_s · (∂logprob/∂z)_s W
            self.hidden_SD[rows] = (narrow_CV @ head.weight_VD) * row_weight_C[:, None]
        if self.weight_VD is not None:
            assert self._largest is not None
            # ∂/∂W = max|g| · Σ_s (∂logprob/∂z)_s ⊗ (g_s / max|g|) h_s
            scaled_CD = (hidden_CD * (row_weight_C / self._largest)[:, None]).to(hidden_CD.dtype)
            _add_product_(self.weight_VD, narrow_CV.T, scaled_CD)
        if self.bias_V is not None:
            self.bias_V += row_weight_C @ grad_CV.to(row_weight_C.dtype)

    def sums(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of hidden states, weight and bias, and the factor that the weight's still lacks."""
        return self.hidden_SD, self.weight_VD, self.bias_V, self._largest


def _scaled(
    sums: tuple[Tensor | None, ...], factor: Tensor, types: tuple[torch.dtype, ...]
) -> tuple[Tensor | None, ...]:
    """The three gradients of `_Gradients.sums` times `factor`, in the types of what they belong to."""
    hidden_SD, weight_VD, bias_V, largest = sums
    weight_factor = factor if largest is None else factor * largest
    return tuple(
        # rounded as it is multiplied: of a head's gradient there is no second copy in float32
        None if total is None else torch.mul(total, by, out=total.new_empty(total.shape, dtype=dtype))
        for total, by, dtype in zip(
            (hidden_SD, weight_VD, bias_V), (factor, weight_factor, factor), types, strict=True
        )
    )


def _types(hidden_SD: Tensor, head: _Head) -> tuple[torch.dtype, ...]:
    """Of hidden states, weight and bias."""
    weight_VD, bias_V = head.weight_VD, head.bias_V
    return hidden_SD.dtype, weight_VD.dtype, weight_VD.dtype if bias_V is None else bias_V.dtype


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_SD: Tensor, targets_S: Tensor, *head_parts: Any) -> Tensor:
        head = _Head(*head_parts)
        logprob_S = hidden_SD.new_empty(hidden_SD.shape[0], dtype=_accumulation_dtype(hidden_SD))
        for rows in _chunks(hidden_SD, head.weight_VD.shape[0]):
            logits_CV = _logits(hidden_SD[rows], head)
            logprob_S[rows], _ = logprob_(logits_CV, targets_S[rows], scale=head.scale, softcap=head.softcap)
            del logits_CV  # before the next ones are there
        ctx.save_for_backward(hidden_SD, targets_S, head.weight_VD, head.bias_V)
        ctx.scale, ctx.softcap = head.scale, head.softcap
        return logprob_S

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_S,) = grads
        hidden_SD, targets_S, weight_VD, bias_V = ctx.saved_tensors
        head = _Head(weight_VD, bias_V, ctx.scale, ctx.softcap)
        needed = ctx.needs_input_grad
        total = _Gradients(hidden_SD, head, (needed[0], needed[2], needed[3]), grad_S)
        for rows in _chunks(hidden_SD, weight_VD.shape[0]):
            grad_CV = _logits(hidden_SD[rows], head)
            softmax_gradient_(grad_CV, targets_S[rows], scale=head.scale, softcap=head.softcap)
            total.add(rows, hidden_SD[rows], grad_CV, head)
            del grad_CV  # before the next chunk's logits are there
        hidden, weight, bias = _scaled(total.sums(), grad_S.new_ones(()), _types(hidden_SD, head))
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
        total = _Gradients(hidden_SD, head, needs, -weights_S)
        for rows in _chunks(hidden_SD, head.weight_VD.shape[0]):
            logits_CV = _logits(hidden_SD[rows], head)
            if any(needs):  # the logits become their gradient in place
                logprob_C = softmax_gradient_(
                    logits_CV, targets_S[rows], scale=head.scale, softcap=head.softcap
                )
                total.add(rows, hidden_SD[rows], logits_CV, head)
            else:
                logprob_C, _ = logprob_(logits_CV, targets_S[rows], scale=head.scale, softcap=head.softcap)
            loss -= (weights_S[rows] * logprob_C).sum()
            del logits_CV  # before the next ones are there
        ctx.save_for_backward(*total.sums())  # given back as soon as they are read
        ctx.types = _types(hidden_SD, head)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = _scaled(ctx.saved_tensors, grads[0], ctx.types)
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
