"""4-bit weights of a decoder layer in the type of its products, held from pass to pass.

To unpack a weight is to read half a byte and write two for each of its elements, once forward and once backward: 2 to
3% of a QLoRA step of the 8B shape. What is held are the very buffers that a pass makes otherwise, with the same room
for adapters, so every policy still gives the same numbers.

Shape suffixes: N output columns, K input columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunesmith.models.projections import Group


@dataclass(frozen=True, slots=True)
class _Source:
    """A weight as it was when a buffer was made of it."""

    weight: Tensor
    state: Any
    version: int
    at: int

    @classmethod
    def of(cls, weight: Tensor) -> _Source:
        version = 0 if weight.is_inference() else weight._version
        return cls(weight, getattr(weight, "quant_state", None), version, weight.data_ptr())

    def same(self, weight: Tensor) -> bool:
        """Whether it is this weight, and nothing was written to it or put in its place."""
        now = _Source.of(weight)
        kept = now.weight is self.weight and now.state is self.state
        return kept and (now.version, now.at) == (self.version, self.at)


@dataclass(frozen=True, slots=True)
class _Made:
    """A buffer, and what it was made of."""

    sources: tuple[_Source, ...]
    weight_NK: Tensor

    def serves(self, weights: tuple[Tensor, ...], dtype: torch.dtype, shape: tuple[int, int]) -> bool:
        """Whether it holds these weights as they are now, in this type, with so many rows and columns or more."""
        same = len(self.sources) == len(weights) and all(
            source.same(weight) for source, weight in zip(self.sources, weights, strict=True)
        )
        roomy = self.weight_NK.shape[0] >= shape[0] and self.weight_NK.shape[1] >= shape[1]
        return same and self.weight_NK.dtype == dtype and roomy


class Unpacked:
    """The weights of one layer, by group.

    Each is made where it is first read, and again where what it was made of has changed, as by a merge.
    """

    def __init__(self) -> None:
        self._made: dict[str, _Made] = {}

    @property
    def bytes(self) -> int:
        """Of all that is held."""
        return sum(made.weight_NK.nbytes for made in self._made.values())

    def read(self, name: str, group: Group, dtype: torch.dtype, *, below: int, beside: int) -> Tensor:
        """The weight of a group as `Group.weight` gives it, `[N + below, K + beside]`.

        Only groups of 4-bit weights are held; others are read as ever.
        """
        weights = tuple(projection.base.weight for projection in group.projections)
        if group.trains_weight or not all(hasattr(weight, "quant_state") for weight in weights):
            return group.weight(dtype, below=below, beside=beside)
        shape = group.columns + below, group.inputs + beside
        made = self._made.pop(name, None)
        if made is None or not made.serves(weights, dtype, shape):
            made = None  # there may be no room for the old one and the new one
            # a buffer that is made while a sample is drawn is written to in training as well
            with torch.inference_mode(False), torch.no_grad():
                weight_NK = group.weight(dtype, below=below, beside=beside)
            made = _Made(tuple(map(_Source.of, weights)), weight_NK)
        self._made[name] = made
        return made.weight_NK[: shape[0], : shape[1]]
