"""Bytes of the buffers of a fused decoder layer, each as its decoder allocates it. Torch-free.

Shape suffixes: T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tunesmith.planning.facts import LayerFacts, Work
from tunesmith.planning.tape import rounded

SPARE_ROWS = 96
"""Rows that `models.projections.join_weights` leaves free below 16-bit weights."""

FLOAT = 4
TILE_ALIGNED = 128


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of a layer's buffers."""

    layer: LayerFacts
    work: Work

    def tile(self) -> Sizes:
        """The same for a tile of tokens."""
        most = self.work.tile_tokens
        assert most is not None
        tokens = -(-self.work.tokens // -(-self.work.tokens // most))
        rows = min(most, -(-tokens // TILE_ALIGNED) * TILE_ALIGNED)
        return Sizes(self.layer, replace(self.work, documents=(rows,), tile_tokens=None))

    def rows(self, columns: float) -> float:
        """`[T, columns]` in the compute type."""
        return self.work.tokens * columns * self.work.itemsize

    def floats(self, columns: float) -> float:
        """`[T, columns]` in float32."""
        return self.work.tokens * columns * FLOAT

    def adapted(self, group: str) -> bool:
        """Whether the group carries an adapter."""
        return self.ranks(group) > 0

    def ranks(self, group: str) -> int:
        """Columns of all adapters of a group side by side."""
        return self.work.ranks(self.layer, group)

    def foldable(self, group: str) -> int:
        """Those that GEMMs take along."""
        ranks = self.ranks(group)
        return ranks if ranks % 8 == 0 and not self.work.dropout else 0

    def beside(self, group: str) -> int:
        """Columns beside a group's input and weight that u and B take."""
        return -(-self.foldable(group) // 64) * 64

    def weight(self, group: str) -> float:
        """A dequantised weight with room for its adapter; 0 where it lies in one piece already."""
        if self.work.quantize == "none":
            return 0
        rows, columns = self.layer.linear.matrices[group]
        if group in ("qkv", "gate_up"):
            rows += self.foldable(group)
        else:
            columns += self.beside(group)
        return rows * columns * self.work.itemsize

    def folds(self, group: str) -> bool:
        """Whether one GEMM gives both products: 16-bit weights have room below for so many rows, and none beside."""
        if not self.foldable(group):
            return False
        if self.work.quantize == "none":
            return group in ("qkv", "gate_up") and self.foldable(group) <= SPARE_ROWS
        return True

    def operands(self) -> float:
        """The adapters of all groups, cast for the GEMMs."""
        total = 0
        for group, (rows, columns) in self.layer.linear.matrices.items():
            if self.adapted(group):
                total += rounded(self.ranks(group) * columns * self.work.itemsize)
                total += rounded(rows * self.work.rank * self.work.itemsize)
        return total

    def gradients(self, group: str) -> float:
        """Of A and B of a group's adapters, in the type of their parameters."""
        rows, columns = self.layer.linear.matrices[group]
        one = self.work.trained_itemsize
        if not self.adapted(group):
            return 0
        return rounded(self.ranks(group) * columns * one) + rounded(rows * self.work.rank * one)
