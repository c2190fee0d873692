"""Policies: for each stage of a decoder layer, whether its result is kept, recomputed or moved to the host.

    stage       result                                  columns (8B shape)   to recompute it
    input       the layer's input                        4,096                (nothing: it comes from outside)
    qkv         q, k, v after RoPE                       6,144                norm, one GEMM, RoPE
    attention   attention output and log-sum-exp         4,096                attention
    middle      residual stream between the two halves   4,096                the output projection
    gate_up     gate and up before the activation       28,672                norm, the largest GEMM

The norms' results and the gated activation are never kept: the backward kernels compute them again on their way,
in registers. Every policy gives the same numbers; they differ in bytes and seconds only.
"""

from __future__ import annotations

from dataclasses import dataclass

STAGES = ("qkv", "attention", "middle", "gate_up")


@dataclass(frozen=True, slots=True)
class Policy:
    """What a layer holds between forward and backward.

    Attributes:
        name: as `memory.policy` and reports say it.
        keep: stages of `STAGES` whose results are held; the others are computed again in backward.
        offload: whether the layer's input and what is kept lie in pinned host memory in the meantime.
    """

    name: str
    keep: frozenset[str]
    offload: bool = False

    def __post_init__(self) -> None:
        assert self.keep <= set(STAGES)
        # the log-sum-exp of attention is of no use without q, k and v, nor the middle without the output
        assert "attention" not in self.keep or "qkv" in self.keep


_HALF = frozenset({"qkv", "attention", "middle"})

POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy("keep", frozenset(STAGES)),
        Policy("recompute_gate_up", _HALF),
        Policy("offload_attention", _HALF, offload=True),
        Policy("recompute", frozenset()),
        Policy("offload", frozenset(), offload=True),
    )
}
"""Fastest first; each needs less GPU memory than the one before."""
