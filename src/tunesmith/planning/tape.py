"""Counts bytes as a step allocates and frees them, from sizes alone. Torch-free."""

from __future__ import annotations

BLOCK = 512
"""CUDA's allocator hands out multiples of it."""


def rounded(size: float) -> int:
    """Bytes that an allocation of `size` takes."""
    return -(-int(size) // BLOCK) * BLOCK


class Tape:
    """Named buffers that are alive, and the most bytes that ever were.

    Attributes:
        now: bytes now.
        peak: the most so far.
    """

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._sizes: dict[str, int] = {}

    def make(self, name: str, size: float) -> None:
        """A buffer comes to life; one of that name takes the place of the one before, which dies after."""
        before = self._sizes.pop(name, 0)
        self._sizes[name] = rounded(size)
        self.now += self._sizes[name]
        self.peak = max(self.peak, self.now)
        self.now -= before

    def drop(self, *names: str) -> None:
        """Buffers die; names that are not alive are passed over."""
        for name in names:
            self.now -= self._sizes.pop(name, 0)

    def brief(self, *sizes: float) -> None:
        """Buffers that are alive together for a moment."""
        self.peak = max(self.peak, self.now + sum(map(rounded, sizes)))

    def has(self, name: str) -> bool:
        """Whether a buffer of that name is alive."""
        return name in self._sizes

    def size(self, *names: str) -> int:
        """Bytes of those that are alive among these."""
        return sum(self._sizes.get(name, 0) for name in names)

    def only(self, names: set[str]) -> None:
        """All others die."""
        self.drop(*(set(self._sizes) - names))
