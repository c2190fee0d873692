"""What each policy of a layer holds and moves. Torch-free.

`models.policy` makes its policies of these rows, and says what they mean and why there are these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Held:
    """What a layer holds between forward and backward.

    Attributes:
        keep: stages whose results are held; the others are computed again in backward. `weights` are no stage of a
            pass: 4-bit weights as they were unpacked, which the layer holds from its first pass on.
        moved: of these and the layer's `input`, what lies in host memory in the meantime.
    """

    keep: frozenset[str] = frozenset()
    moved: frozenset[str] = frozenset()


_HALF = frozenset({"qkv", "attention", "middle"})
_INPUT = frozenset({"input"})

HELD: Mapping[str, Held] = {
    "keep_all_unpacked": Held(_HALF | {"gate_up", "act", "weights"}),
    "keep_unpacked": Held(_HALF | {"gate_up", "weights"}),
    "keep_all": Held(_HALF | {"gate_up", "act"}),
    "keep": Held(_HALF | {"gate_up"}),
    "keep_offload_attention": Held(_HALF | {"gate_up"}, moved=_HALF | _INPUT),
    "recompute_gate_up": Held(_HALF),
    "offload_attention": Held(_HALF, moved=_HALF | _INPUT),
    "recompute_projections": Held(frozenset({"attention", "middle"})),
    "recompute": Held(),
    "offload": Held(moved=_INPUT),
    "keep_offload_all": Held(_HALF | {"gate_up"}, moved=_HALF | _INPUT | {"gate_up"}),
}
"""By name, fastest first at rows of usual length; the last one is for long rows."""

UNPACKED = tuple(name for name, held in HELD.items() if "weights" in held.keep)
"""Those of layers of 4-bit weights for which memory is left when all that attention and the MLP make is held."""

IN_FLIGHT = 1
"""Layers that run while a layer's copies to the host are under way, before its memory is let go. With more of them
layers that all move as much would wait as long, since the link is either ahead of the compute or behind it."""
