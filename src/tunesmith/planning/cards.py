"""GPUs by the names that people use, and what they reach. Torch-free.

What a data sheet says is a bound. `MEASURED` says what training reached of it on one H100 80GB (benchmarks/RESULTS.md);
every other card is taken to reach the same shares of its own sheet, and is marked as estimated. A run on a card can
measure its own rates (`models.calibrate`), which then stand in their place.

`gib` is what torch calls the card's total memory: the sheet's figure less what the driver and error correction keep.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace

from tunesmith.contracts.errors import UserError
from tunesmith.planning.graphs import HOST_SECONDS

KERNEL_SECONDS = 2.5e-6
"""Between two kernels on the device. The gaps of a profiled step are 0.3 ms a layer of some hundred kernels, and 135M
steps, whose kernels are next to nothing, take 0.48 ms a layer (benchmarks/RESULTS.md)."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What a card reaches in training.

    Attributes:
        products: operations a second of GEMMs in 16 bits.
        attention_forward: operations a second of attention over long documents with heads of 128 columns, two
            products a pair of query and key; attention_backward with five.
        memory: bytes a second that copying moves, reads and writes counted.
        host_link: bytes a second from pinned host memory or to it, one way.
        host_layer: seconds that the host takes to launch a fused layer, forward and backward.
        kernel: seconds between two kernels.
        source: where the figures are from, for reports.
        estimated: whether nothing was measured on such a card.
    """

    products: float
    attention_forward: float
    attention_backward: float
    memory: float
    host_link: float
    host_layer: float = HOST_SECONDS
    kernel: float = KERNEL_SECONDS
    source: str = ""
    estimated: bool = True


@dataclass(frozen=True, slots=True)
class Shares:
    """What training reaches of a data sheet's figures, by the fields of `Rates`.

    Attributes:
        products: of the tensor rate, as attention_forward and attention_backward are.
        memory: of the bandwidth.
        host_link: of the link's bandwidth one way.
    """

    products: float
    attention_forward: float
    attention_backward: float
    memory: float
    host_link: float


MEASURED = Shares(
    # 790 to 798 TFLOP/s in isolation; 740 in steps of half a second, at the clock that the power limit leaves
    products=740 / 989.4,
    # 610 and 467 TFLOP/s for documents of 4,096 and the diagonal that `seconds` counts besides, less 5% in steps
    attention_forward=645 / 989.4,
    attention_backward=575 / 989.4,
    memory=3.01 / 3.35,
    host_link=54 / 64,
)
"""One H100 80GB SXM (benchmarks/RESULTS.md)."""

_WITHOUT_TENSOR_MEMORY = replace(MEASURED, attention_forward=0.35, attention_backward=0.3)


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU.

    Attributes:
        name: as people call it.
        gib: memory that torch reports.
        tensor: operations a second in bfloat16 (float16 where it has none), dense, summed in float32.
        bandwidth: bytes a second of its memory.
        link: bytes a second of its link to the host, one way.
        capability: compute capability.
        source: of the figures.
        shares: what training reaches of them.
        estimated: whether the shares are another card's.
    """

    name: str
    gib: float
    tensor: float
    bandwidth: float
    link: float
    capability: tuple[int, int]
    source: str
    shares: Shares = MEASURED
    estimated: bool = True

    @property
    def memory_bytes(self) -> int:
        """Memory that torch reports."""
        return int(self.gib * 2**30)

    def rates(self) -> Rates:
        """What it reaches in training."""
        shares = self.shares
        return Rates(
            products=self.tensor * shares.products,
            attention_forward=self.tensor * shares.attention_forward,
            attention_backward=self.tensor * shares.attention_backward,
            memory=self.bandwidth * shares.memory,
            host_link=self.link * shares.host_link,
            source=f"measured on {self.name}" if not self.estimated else self.source,
            estimated=self.estimated,
        )


_PCIE3, _PCIE4, _PCIE5 = 16e9, 32e9, 64e9
