"""The canary: before a run starts on a GPU, each kernel it uses is checked on this card at this model's shapes.

A compiler, a driver or a card can be wrong about one kernel at one shape and right everywhere else, and training
would go on with it and learn a little worse. So every kernel is compared with its torch reference in float64 in a
few seconds; one that fails is switched off, its reference computes instead, and the run says so. The outcome is
remembered per card, versions and shapes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from tunesmith.kernels import launch
from tunesmith.kernels.attention import (
    BACKENDS,
    Documents,
    Heads,
    Scores,
    attention_backward,
    attention_forward,
)
from tunesmith.kernels.attention import switched_off as attention_off
from tunesmith.kernels.attention_cudnn import cudnn_frontend
from tunesmith.kernels.catalog import CATALOG, Size
from tunesmith.kernels.measure import error, errors
from tunesmith.kernels.remembered import outcome_file, recall, remember

TOKENS = 193
"""Rows of every check: no multiple of any tile, and more than one tile of each kernel."""
ATTENTION_LENGTHS = ((65, 1, 127), (96, 96))
"""Odd and equal documents, for backends differ in which they take."""
ATTENTION_WINDOW = 40
"""Longest window that is checked: one that hides nothing of such documents would not be."""
ATTENTION_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
"""Attention rounds its probabilities and its output: 8 bits in bfloat16, 11 in float16, 22 in products of float32."""


@dataclass(frozen=True, slots=True)
class Traits:
    """What a family's layers ask of the kernels; the defaults are Llama's.

    Attributes:
        norm: kind of the norms around the blocks, `rms` or `layer`.
        norm_bias: whether they have a bias.
        norm_offset: added to their weights.
        before: whether any stands before a block; behind likewise.
        qk_norm: whether q and k are normed; qk_full: over all heads.
        one_qkv: whether one matrix, with one adapter, holds q, k and v; one_gate_up likewise.
        activation: row of `glu.ACTIVATIONS`.
        gated: whether the MLP has a gate.
        rotary_dim: columns of a head that rotate; None is all.
        interleaved: whether neighbouring columns rotate together.
        spread: whether every second column of the tables is read.
        residual_multiplier: factor on what a block adds.
        norms_train: whether the weights of any norm train.
    """

    norm: str = "rms"
    norm_bias: bool = False
    norm_offset: float = 0.0
    before: bool = True
    behind: bool = False
    qk_norm: bool = False
    qk_full: bool = False
    one_qkv: bool = False
    one_gate_up: bool = False
    activation: str = "silu"
    gated: bool = True
    rotary_dim: int | None = None
    interleaved: bool = False
    spread: bool = False
    residual_multiplier: float = 1.0
    norms_train: bool = False


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the kernels of a run depend on.

    Attributes:
        width: hidden size.
        inner: intermediate size of the MLP.
        heads: layout of the fused q, k, v buffer.
        rank: rank of the adapters, 0 without.
        vocabulary: rows of the head.
        nf4: whether weights are dequantised.
        scores: each kind of scores that its layers make.
        traits: what else its family asks of the kernels.
    """

    width: int
    inner: int
    heads: Heads
    rank: int
    vocabulary: int
    nf4: bool
    scores: tuple[Scores, ...] = (Scores(),)
    traits: Traits = Traits()


def _attention_size(m: ModelShape) -> Size:
    """The kind of scores with most to it; `_attention_findings` checks the others, and every backend."""
    kind = max(m.scores, key=lambda scores: (scores.softcap is not None, scores.window is not None))
    return {
        "lengths": ATTENTION_LENGTHS[0],
        "heads": m.heads.query,
        "kv_heads": m.heads.key_value,
        "head_dim": m.heads.size,
        "scale": kind.scale,
        "window": kind.window and min(kind.window, ATTENTION_WINDOW),
        "softcap": kind.softcap,
    }


def _norm_size(kind: str, **options: bool) -> Callable[[ModelShape], Size | None]:
    """Of a kind of norm, where a layer has it around its blocks."""

    def size(m: ModelShape) -> Size | None:
        traits = m.traits
        if traits.norm != kind or not (traits.before or traits.behind):
            return None
        size: Size = {
            "tokens": TOKENS,
            "width": m.width,
            "offset": traits.norm_offset,
            "bias": traits.norm_bias,
            "weight_grad": traits.norms_train,
        }
        return {**size, **options}

    return size


def _behind_size(m: ModelShape) -> Size | None:
    traits = m.traits
    return {"tokens": TOKENS, "width": m.width, "offset": traits.norm_offset} if traits.behind else None


def _residual_size(m: ModelShape) -> Size:
    traits = m.traits
    size: Size = {"tokens": TOKENS, "columns": m.width, "rank": m.rank, "scale": traits.residual_multiplier}
    return {**size, "alone": traits.behind and m.rank > 0}


def _qkv_size(*, normed: bool) -> Callable[[ModelShape], Size | None]:
    """Of the pass over q, k and v, where theirs is the one with norms, or the one without."""

    def size(m: ModelShape) -> Size | None:
        traits = m.traits
        if traits.qk_norm != normed:
            return None
        return {
            "tokens": TOKENS,
            "heads": m.heads.query,
            "kv_heads": m.heads.key_value,
            "head_dim": m.heads.size,
            "rank": m.rank,
            "rotary_dim": traits.rotary_dim,
            "shared": traits.one_qkv,
            "interleaved": traits.interleaved,
            "spread": traits.spread,
            "offset": traits.norm_offset,
            "full": traits.qk_full,
            "weight_grad": traits.norms_train,
        }

    return size


def _mlp_size(m: ModelShape) -> Size:
    traits = m.traits
    return {
        "tokens": TOKENS,
        "inner": m.inner,
        "rank": m.rank,
        "down_rank": m.rank,
        "activation": traits.activation,
        "plain": not traits.gated,
        "shared": traits.one_gate_up,
    }


def _adamw_size(m: ModelShape) -> Size:
    """Adapters are float32 whatever the compute type is, hence both; bfloat16 is rounded stochastically."""
    elements = m.width * max(1, m.rank)
    return {"tensors": 4, "elements": elements, "mixed": True, "max_norm": 1.0, "seed": 1}


_SIZES: dict[str, Callable[[ModelShape], Size | None]] = {
    "rms_norm": _norm_size("rms"),
    "rms_norm_backward": _norm_size("rms", add=True, recompute=True),
    "add_normed": _behind_size,
    "layer_norm": _norm_size("layer"),
    "layer_norm_backward": _norm_size("layer", add=True, recompute=True),
    # always: whether a table goes to the host is decided when it is known whether its kernel is right
    "gather_rows": lambda m: {"rows": 2 * TOKENS, "columns": m.width, "tokens": TOKENS},
    "add_residual": _residual_size,
    "rope_qkv_": _qkv_size(normed=False),
    "qk_norm_rope": _qkv_size(normed=True),
    "qk_norm_rope_backward_": _qkv_size(normed=True),
    "glu": _mlp_size,
    "glu_backward_": _mlp_size,
    "dequantize_nf4": lambda m: {"rows": TOKENS, "columns": m.width, "nested": True} if m.nf4 else None,
    "softmax_gradient_": lambda m: {"rows": 32, "vocabulary": m.vocabulary},
    "logprob_": lambda m: {"rows": 32, "vocabulary": m.vocabulary},
    "packed_attention": _attention_size,
    "packed_attention_backward": _attention_size,
    "adamw_": _adamw_size,
    "adamw_8bit_": _adamw_size,
}
"""Size at which a row of the catalog is checked for a model; None where the model does not use it."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A kernel that failed: its name, and how large its error was against what is allowed."""

    name: str
    error: float
    tolerance: float

    def __str__(self) -> str:
        return (
            f"The kernel {self.name} errs by {self.error:.2g} on this card, where {self.tolerance:.2g} is allowed; "
            f"another form computes instead."
        )


def check_kernels(
    shape: ModelShape, dtype: torch.dtype, device: torch.device, memory: Path | None = None
) -> list[Finding]:
    """Check every kernel that a model uses, switch off those that fail, and return them.

    Args:
        dtype: compute type of the run.
        memory: folder in which outcomes are remembered; None checks anew.
    """
    cudnn = getattr(cudnn_frontend(), "__version__", None)
    file = outcome_file(memory, device, shape=asdict(shape), dtype=str(dtype), cudnn=cudnn)
    found = recall(file, lambda entries: [Finding(**entry) for entry in entries])
    if found is None:
        found = [*_kernel_findings(shape, dtype, device), *_attention_findings(shape, dtype, device)]
        remember(file, [asdict(finding) for finding in found])
    for finding in found:
        switched_off = attention_off if finding.name in BACKENDS else launch.switched_off
        switched_off.add(finding.name)
    return found


def _kernel_findings(shape: ModelShape, dtype: torch.dtype, device: torch.device) -> list[Finding]:
    findings = []
    for name, size_of in _SIZES.items():
        size = size_of(shape)
        if size is None:
            continue
        tolerance = CATALOG[name].tolerances[dtype]
        worst = max(_guarded(partial(errors, name, size, dtype, device)))
        if not worst <= tolerance:
            findings.append(Finding(name, worst, tolerance))
    return findings


def _attention_findings(shape: ModelShape, dtype: torch.dtype, device: torch.device) -> list[Finding]:
    """Every backend that could be chosen against the reference in float64, on odd and on equal documents."""
    findings: dict[str, Finding] = {}
    heads = shape.heads
    for lengths, kind in itertools.product(ATTENTION_LENGTHS, shape.scores):
        scores = kind if kind.window is None else replace(kind, window=min(kind.window, ATTENTION_WINDOW))
        documents = Documents(lengths, torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32))
        generator = torch.Generator(device).manual_seed(0)
        fused_TN = torch.randn(sum(lengths), heads.columns, device=device, generator=generator).to(dtype)
        grad = torch.randn(sum(lengths), heads.query * heads.size, device=device, generator=generator).to(
            dtype
        )
        want = _attention("sdpa", fused_TN.double(), grad.double(), heads, documents, scores)
        for name, row in BACKENDS.items():
            if name == "sdpa" or not row.fits(fused_TN, heads, documents, scores):
                continue
            measure = partial(_attention_errors, name, fused_TN, grad, heads, documents, scores, want)
            worst = max(_guarded(measure))
            if not worst <= ATTENTION_TOLERANCE[dtype]:
                findings[name] = Finding(name, worst, ATTENTION_TOLERANCE[dtype])
    return list(findings.values())


def _attention(
    name: str,
    fused_TN: torch.Tensor,
    grad: torch.Tensor,
    heads: Heads,
    documents: Documents,
    scores: Scores,
) -> tuple[torch.Tensor, torch.Tensor]:
    output, used, saved = attention_forward(fused_TN, heads, documents, scores=scores, backend=name)
    return output, attention_backward(grad, fused_TN, output, saved, used, heads, documents, scores=scores)


def _attention_errors(
    name: str,
    fused_TN: torch.Tensor,
    grad: torch.Tensor,
    heads: Heads,
    documents: Documents,
    scores: Scores,
    want: tuple[torch.Tensor, torch.Tensor],
) -> list[float]:
    ours = _attention(name, fused_TN, grad, heads, documents, scores)
    return [error(*pair) for pair in zip(ours, want, strict=True)]


def _guarded(measure: Callable[[], list[float]]) -> list[float]:
    """The errors, or infinity where the kernel cannot be compiled or launched here."""
    try:
        return measure()
    except Exception:  # Triton's and cuDNN's own errors have no other base
        return [float("inf")]
