"""GPUs by the names that people use, and what they reach in training. Torch-free.

What a data sheet says is a bound. `MEASURED` is what training reaches of it on an H100 80GB, and the H200's row was
measured too; every other card is taken to reach the H100's shares of its own sheet, and says that it is estimated. A
run can measure the rates of the card that it has (`models.calibrate`), which then take the place of these.

Sheets name tensor rates in several ways. Here they are dense, in bfloat16 (float16 where a card lacks it), summed in
float32, which consumer cards do at half the rate that they advertise.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace

from tunesmith.contracts.errors import UserError
from tunesmith.planning.graphs import HOST_SECONDS

KERNEL_SECONDS = 3.5e-6
"""What a kernel takes however little it does, the gap before it included. Chosen so that 135M steps from CUDA graphs,
which consist of little else, come out (0.48 ms a layer of some hundred kernels in benchmarks/RESULTS.md)."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What a card reaches in training.

    Attributes:
        products: operations a second of GEMMs in 16 bits.
        attention_forward: operations a second of attention over long documents with heads of 128 columns, two
            products for a pair of query and key; attention_backward with five.
        memory: bytes a second that copying moves, reads and writes counted.
        host_link: bytes a second from pinned host memory or to it, one way.
        host_layer: seconds of the host to launch a fused layer, forward and backward.
        kernel: seconds of a kernel that does nothing.
        source: where the figures are from, as reports say it.
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
    """What training reaches of a sheet's figures.

    Attributes:
        products: GEMMs, of the tensor rate; attention_forward and attention_backward, as in `Rates`, too.
        memory: copying, of the bandwidth.
        host_link: copies from and to pinned memory, of the link.
    """

    products: float
    attention_forward: float
    attention_backward: float
    memory: float
    host_link: float


MEASURED = Shares(
    # 790 to 798 TFLOP/s alone, 700 to 785 in profiles of steps, where all units draw on the same power. Chosen so
    # that steps of the 8B shape with adapters come out, and those of other shapes do with it
    products=713 / 989.4,
    # 610 and 467 for documents of 4,096 are 685 and 620 without what `amounts.EXTRA_KEYS` stands for; less in steps
    attention_forward=645 / 989.4,
    attention_backward=575 / 989.4,
    memory=3.01 / 3.35,
    host_link=54 / 64,
)
"""H100 80GB SXM (benchmarks/RESULTS.md, and profiles of steps of 8 layers of five families)."""

_H200 = replace(MEASURED, products=678 / 989.4)
"""Chosen so that Mistral's two steps on an H200 come out, and those of five other families do with it; with the
H100's share they would be foreseen 2 to 6% too fast. Copies are taken to reach the H100's share of its
bandwidth."""

_BEFORE_AMPERE = replace(
    MEASURED,
    attention_forward=MEASURED.attention_forward * 455 / 610,
    attention_backward=MEASURED.attention_backward * 341 / 467,
)
"""Neither cuDNN's graphs nor torch's FlashAttention run there: our Triton kernels, as far behind as on an H100."""


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU.

    Attributes:
        name: as people say it.
        gb: memory as it is sold.
        gib: memory that torch reports; the driver and error correction keep the rest.
        tensor: operations a second, as the module's docstring says.
        bandwidth: bytes a second of its memory.
        link: bytes a second of its link to the host, one way.
        capability: compute capability.
        source: of these figures.
        shares: what training reaches of them.
        estimated: whether the shares are those of another card.
    """

    name: str
    gb: int
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
            source="its data sheet and an H100's shares of its own"
            if self.estimated
            else "steps on such a card",
            estimated=self.estimated,
        )


_PCIE3, _PCIE4, _PCIE5 = 16e9, 32e9, 64e9
"""16 lanes, one way, less nothing."""

# Memory as torch's messages name the capacity of such cards, the least of what drivers leave.
CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        Card("B200", 180, 178.3, 2250e12, 8.0e12, _PCIE5, (10, 0), "NVIDIA Blackwell data sheet, HGX B200"),
        Card(
            "H200", 141, 139.8, 989.4e12, 4.8e12, _PCIE5, (9, 0), "NVIDIA H200 data sheet, SXM",
            shares=_H200, estimated=False,
        ),
        Card(
            "H100-80GB", 80, 79.1, 989.4e12, 3.35e12, _PCIE5, (9, 0), "NVIDIA H100 data sheet, SXM",
            estimated=False,
        ),
        Card("H100-PCIE", 80, 79.1, 756e12, 2.0e12, _PCIE5, (9, 0), "NVIDIA H100 data sheet, PCIe"),
        Card("A100-80GB", 80, 79.2, 312e12, 2.039e12, _PCIE4, (8, 0), "NVIDIA A100 data sheet, SXM"),
        Card("A100-40GB", 40, 39.3, 312e12, 1.555e12, _PCIE4, (8, 0), "NVIDIA A100 data sheet, SXM"),
        Card("L40S", 48, 44.4, 362e12, 864e9, _PCIE4, (8, 9), "NVIDIA L40S data sheet"),
        Card("L4", 24, 22.0, 121e12, 300e9, _PCIE4, (8, 9), "NVIDIA L4 data sheet"),
        Card("A10G", 24, 22.0, 70e12, 600e9, _PCIE4, (8, 6), "NVIDIA A10G product brief"),
        Card("A10", 24, 22.0, 125e12, 600e9, _PCIE4, (8, 6), "NVIDIA A10 data sheet"),
        Card("A40", 48, 44.4, 149.7e12, 696e9, _PCIE4, (8, 6), "NVIDIA A40 data sheet"),
        Card("RTX-6000-ADA", 48, 47.4, 364.2e12, 960e9, _PCIE4, (8, 9), "NVIDIA Ada whitepaper, professional"),
        Card("RTX-A6000", 48, 47.4, 154.8e12, 768e9, _PCIE4, (8, 6), "NVIDIA GA102 whitepaper"),
        Card("RTX-5090", 32, 31.3, 209.5e12, 1.792e12, _PCIE5, (12, 0), "NVIDIA RTX Blackwell whitepaper"),
        Card("RTX-4090", 24, 23.6, 165.2e12, 1.008e12, _PCIE4, (8, 9), "NVIDIA Ada whitepaper"),
        Card("RTX-3090", 24, 23.5, 71e12, 936e9, _PCIE4, (8, 6), "NVIDIA GA102 whitepaper"),
        Card("T4", 16, 14.7, 65e12, 320e9, _PCIE3, (7, 5), "NVIDIA T4 data sheet", shares=_BEFORE_AMPERE),
        Card("V100-32GB", 32, 31.7, 125e12, 900e9, _PCIE3, (7, 0), "NVIDIA V100 data sheet", shares=_BEFORE_AMPERE),
        Card("V100-16GB", 16, 15.7, 125e12, 900e9, _PCIE3, (7, 0), "NVIDIA V100 data sheet", shares=_BEFORE_AMPERE),
    )
}  # fmt: skip
"""Known cards by name, those with most memory first in each class."""

_SILENT = {
    "nvidia", "geforce", "tesla", "quadro", "rtx", "gpu", "generation",
    "hbm2", "hbm2e", "hbm3", "hbm3e", "sxm", "sxm2", "sxm3", "sxm4", "sxm5", "ml",
}  # fmt: skip
"""Words of a name that no two rows of the table differ in."""


def _read(name: str) -> tuple[frozenset[str], int | None]:
    """The words that tell a card from others, and the gigabytes that the name speaks of."""
    text = name.lower().replace("rtx", " rtx ")
    size = re.search(r"(?<![a-z0-9])(\d{1,3})[\s_-]*gi?b?(?![a-z0-9])", text)
    if size:
        text = text[: size.start()] + " " + text[size.end() :]
    words = [word for word in re.findall(r"[a-z0-9]+", text) if word not in _SILENT]
    if size:
        return frozenset(words), int(size[1])
    bare = [word for word in words if re.fullmatch(r"\d{2,3}", word)]
    if len(bare) == 1 and len(words) > 1:
        return frozenset(words) - {bare[0]}, int(bare[0])
    return frozenset(words), None


def find_card(name: str) -> Card:
    """The card that a name means, as people, torch or nvidia-smi say it: `h100`, `NVIDIA A100-SXM4-80GB`, `4090`.

    Raises:
        UserError: no row of `CARDS` has that name, or two have.
    """
    words, size = _read(name)
    by_words = [card for card in CARDS.values() if _read(card.name)[0] == words] or [
        card for card in CARDS.values() if _read(card.name)[0] == words - {"pcie"}
    ]
    found = [card for card in by_words if size is None or abs(card.gb - size) <= 0.1 * card.gb]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"{name!r} is a card of {' or '.join(f'{card.gb} GB' for card in found)}.",
            hint=f"Say {' or '.join(card.name for card in found)}.",
        )
    sharing = [card for card in CARDS.values() if words & _read(card.name)[0]]
    near = [card.name for card in by_words or sharing] or _like(words)
    listed = ", ".join(near or CARDS)
    raise UserError(
        f"There is no GPU called {name!r} in the table of cards.",
        hint=f"{'Nearest' if near else 'Known'}: {listed}.",
    )


def _like(words: frozenset[str]) -> list[str]:
    """Names of cards whose words are written like these."""
    plain = {"".join(sorted(_read(card)[0])): card for card in CARDS}
    return [plain[key] for key in difflib.get_close_matches("".join(sorted(words)), plain, n=3, cutoff=0.5)]
