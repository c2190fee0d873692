"""Policies: for each stage of a decoder layer, whether its result is kept, recomputed or moved to the host.

    stage       result                                  columns (8B shape)   to recompute it
    input       the layer's input                        4,096                (nothing: it comes from outside)
    qkv         q, k, v after RoPE (before, if normed)   6,144                norm, one GEMM, RoPE
    attention   attention output and log-sum-exp         4,096                attention
    middle      residual stream between the two halves   4,096                the output projection
    gate_up     gate and up before the activation       28,672                norm, the largest GEMM
    act         the gated activation                    14,336                (the backward kernel passes by)

The norms' results are never kept: backward needs them in products only that it takes from their inputs. What a norm
behind a block reads is kept with the middle. The gated activation costs backward one more write of it where it is not
kept. Every policy gives the same numbers; they differ in bytes and seconds only.
"""

from __future__ import annotations

from dataclasses import dataclass

STAGES = ("qkv", "attention", "middle", "gate_up", "act")


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
        # backward reads the activation beside gate and up only
        assert "act" not in self.keep or "gate_up" in self.keep


_HALF = frozenset({"qkv", "attention", "middle"})

POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy("keep_all", frozenset(STAGES)),
        Policy("keep", _HALF | {"gate_up"}),
        Policy("recompute_gate_up", _HALF),
        Policy("offload_attention", _HALF, offload=True),
        Policy("recompute", frozenset()),
        Policy("offload", frozenset(), offload=True),
    )
}
"""Fastest first; each needs less GPU memory than the one before."""
