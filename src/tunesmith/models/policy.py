"""Policies: for each stage of a decoder layer, whether its result is kept, recomputed or moved to the host.

    stage       result                                  columns (8B shape)   to recompute it
    input       the layer's input                        4,096                (nothing: it comes from outside)
    qkv         q, k, v after RoPE (before, if normed)   6,144                norm, one GEMM, RoPE
    attention   attention output and log-sum-exp         4,096                attention
    middle      residual stream between the two halves   4,096                the output projection
    gate_up     gate and up before the activation       28,672                norm, the largest GEMM
    act         the gated activation                    14,336                (the backward kernel passes by)

The norms' results are never kept: backward needs them in products only that it takes from their inputs. What a norm
behind a block reads is kept with the middle, and where one stands behind attention, it is kept instead of the middle:
one pass over it makes that again, 0.06 ms of a layer of Gemma 3 12B for 60 MB. The gated activation costs backward
one more write of it where it is not kept. `keep_all` keeps both. `keep_unpacked` and
`keep_all_unpacked` hold the layer's 4-bit weights in 16 bits as well, for all passes to come. Every policy gives the
same numbers; they differ in bytes and seconds only.
Rank-wide products and statistics of rows are kept or rebuilt with the stage that they fall out of
(`layer_call.REBUILT_WITH`); where nothing but the input is kept and that travels, what is left of them travels with
it.

Why these rows. Per layer of the 8B shape at 8,192 tokens in bfloat16, on an H100 whose forward pass of a layer takes
5 ms and whose host link moves 54 GB/s each way beside it:

    what is given up                  MB saved     ms it costs      MB a ms
    4-bit weights in 16 bits             445        0.4              1,100
    act                                  235        0.2              1,100
    input, qkv, attention, middle        302        0.6 at most        500    travels: 5.6 ms on a link of its own
    gate_up                              470        2.8                170
    qkv, once gate_up is gone            101        0.7                140    attention itself is not computed again
    attention, middle                    134        1.3                100

So what attention needs travels before gate and up are given up (`keep_offload_attention`): 5.6 ms of copying hide
behind 5 ms of forward almost, and entirely where only some of the layers do so. gate_up does not travel at this
length: 8.7 ms of link for what 2.8 ms of GEMM give. In long rows attention grows with their square and the link has
time to spare: at 32,768 tokens of the 70B shape a layer takes 113 ms forward and copying all it keeps 112, for 44 ms
of GEMM saved in backward (`keep_offload_all`). No middle or attention output is moved alone: what is smaller than the
layer's time on the link is hidden already. The times of rows of the table come from `benchmarks/RESULTS.md` (a
step of 32 layers: keep_all 0.494 s and keep 0.501 s over 16-bit weights; keep 0.508 s, recompute_gate_up 0.597 s,
offload_attention 0.602 s over 4-bit ones) and from the operations of a stage.
"""

from __future__ import annotations

from dataclasses import dataclass

from tunesmith.planning.policies import HELD

STAGES = ("qkv", "attention", "middle", "gate_up", "act")

_INPUT = frozenset({"input"})


@dataclass(frozen=True, slots=True)
class Policy:
    """What a layer holds between forward and backward.

    Attributes:
        name: as `memory.policy` and reports say it.
        keep: stages of `STAGES` whose results are held; the others are computed again in backward. `weights` besides:
            4-bit weights stay unpacked from the first pass on (`unpacked`).
        offload: of these and the layer's `input`, what lies in pinned host memory in the meantime.
    """

    name: str
    keep: frozenset[str]
    offload: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        assert self.keep <= {*STAGES, "weights"}
        assert self.offload <= self.keep | _INPUT
        # backward reads the activation beside gate and up only
        assert "act" not in self.keep or "gate_up" in self.keep


POLICIES: dict[str, Policy] = {name: Policy(name, held.keep, held.moved) for name, held in HELD.items()}
"""Fastest first, on a card whose host link is as fast as that of an H100 and at rows of usual length; the last one is
for long rows. Of those that move nothing to the host and hold no weights each needs less GPU memory than the one
before, and so does each of those that do, the last one apart."""

OF_TOKENS = tuple(name for name, policy in POLICIES.items() if "weights" not in policy.keep)
"""Those that hold nothing but what a pass makes of its tokens, which is what can be measured of a short row."""
