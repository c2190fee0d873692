"""What a GPU has of memory, and what of it a process may use."""

from __future__ import annotations

from dataclasses import dataclass

import torch

CONTEXT = 2**30
"""Bytes that CUDA and its libraries may take beside what torch allocates; the budget leaves room for them."""


@dataclass(frozen=True, slots=True)
class Room:
    """Memory of a device.

    Attributes:
        total: bytes that it has.
        usable: of them free for this process, or its own already.
        allocated: that tensors take.
    """

    total: int
    usable: int
    allocated: int

    @property
    def free(self) -> int:
        """Bytes for further tensors."""
        return self.usable - self.allocated

    def budget(self, share_or_bytes: float) -> int:
        """Bytes that a budget allows, what others hold of the card taken off."""
        asked = share_or_bytes * self.total if share_or_bytes <= 1 else share_or_bytes
        others = max(0, self.total - self.usable - CONTEXT)
        return int(max(0, min(asked - others, self.usable)))


def room_of(device: torch.device) -> Room:
    """The memory of a CUDA device as it is now."""
    free, total = torch.cuda.mem_get_info(device)
    return Room(total, free + torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device))
