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

_PCIE4_8, _PCIE5_8 = 16e9, 32e9
"""The 8 lanes of small desktop cards. How many a laptop wires is its maker's choice, and is taken to be as few."""

_C2C = 450e9
"""NVLink to the CPU of a superchip, one way."""

_PRO, _TURING = "NVIDIA RTX PRO Blackwell whitepaper", "NVIDIA Turing whitepaper"

_PRO_SERVER = "NVIDIA RTX PRO 6000 Server data sheet; the tensor rate is four times its shaders'"
"""As in the whitepaper's figures of the other two: the sheet has none for 16 bits."""

_MOBILE = "NVIDIA's page of GeForce laptops, at the highest boost clock there; the tensor rate is twice its shaders'"
"""The clock of the most power that a maker may give it. The page's AI operations are for higher clocks, by a fifth or
more in the 50 series: by them a laptop would outrun a desktop card of the same chip."""


def _page(family: int) -> str:
    """The source of a GeForce card whose figures are from no whitepaper."""
    return f"NVIDIA's page of the GeForce RTX {family} family; the tensor rate is twice its shaders'"


# Memory as torch's messages name the capacity of such cards, the least of what drivers leave. It is less than what
# nvidia-smi says, as the driver keeps some: 23.5 of the 24.0 GiB (24,564 MiB) of an RTX 4090. Where no message of a
# card was found, it is that of others with as much memory of its generation.
CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        Card("B300", 270, 267.6, 2250e12, 7.7e12, _PCIE5, (10, 3), "NVIDIA Blackwell Ultra data sheet, HGX B300"),
        Card("B200", 180, 178.3, 2250e12, 7.7e12, _PCIE5, (10, 0), "NVIDIA Blackwell data sheet, HGX B200"),
        Card(
            "H200", 141, 139.8, 989.4e12, 4.8e12, _PCIE5, (9, 0), "NVIDIA H200 data sheet, SXM",
            shares=_H200, estimated=False,
        ),
        Card("H200-NVL", 141, 139.8, 835e12, 4.8e12, _PCIE5, (9, 0), "NVIDIA H200 data sheet, NVL"),
        Card("GH200", 96, 94.5, 989.4e12, 4.0e12, _C2C, (9, 0), "NVIDIA GH200 data sheet, 96 GB of HBM3"),
        Card("H20", 96, 95.0, 148e12, 4.0e12, _PCIE5, (9, 0), "NVIDIA HGX H20 data sheet"),
        Card("H100-NVL", 94, 93.0, 835e12, 3.9e12, _PCIE5, (9, 0), "NVIDIA H100 data sheet, NVL"),
        Card(
            "H100-80GB", 80, 79.1, 989.4e12, 3.35e12, _PCIE5, (9, 0), "NVIDIA H100 data sheet, SXM",
            estimated=False,
        ),
        Card("H100-PCIE", 80, 79.1, 756e12, 2.0e12, _PCIE5, (9, 0), "NVIDIA H100 data sheet, PCIe"),
        Card("A100-80GB", 80, 79.2, 312e12, 2.039e12, _PCIE4, (8, 0), "NVIDIA A100 data sheet, SXM"),
        Card("A100-40GB", 40, 39.3, 312e12, 1.555e12, _PCIE4, (8, 0), "NVIDIA A100 data sheet, SXM"),
        Card("A30", 24, 23.4, 165e12, 933e9, _PCIE4, (8, 0), "NVIDIA A30 data sheet"),
        Card("L40S", 48, 44.4, 362e12, 864e9, _PCIE4, (8, 9), "NVIDIA L40S data sheet"),
        Card("L40", 48, 44.4, 181e12, 864e9, _PCIE4, (8, 9), "NVIDIA L40 data sheet"),
        Card("L4", 24, 22.0, 121e12, 300e9, _PCIE4, (8, 9), "NVIDIA L4 data sheet"),
        Card("A10G", 24, 22.0, 70e12, 600e9, _PCIE4, (8, 6), "NVIDIA A10G product brief"),
        Card("A10", 24, 22.0, 125e12, 600e9, _PCIE4, (8, 6), "NVIDIA A10 data sheet"),
        Card("A40", 48, 44.4, 149.7e12, 696e9, _PCIE4, (8, 6), "NVIDIA A40 data sheet"),
        Card("RTX-PRO-6000", 96, 94.9, 503.8e12, 1.792e12, _PCIE5, (12, 0), _PRO),
        Card("RTX-PRO-6000-MAX-Q", 96, 94.9, 438.9e12, 1.792e12, _PCIE5, (12, 0), _PRO),
        Card("RTX-PRO-6000-SERVER", 96, 94.9, 480e12, 1.597e12, _PCIE5, (12, 0), _PRO_SERVER),
        Card("RTX-6000-ADA", 48, 47.4, 364.2e12, 960e9, _PCIE4, (8, 9), "NVIDIA Ada whitepaper, professional"),
        Card("RTX-A6000", 48, 47.4, 154.8e12, 768e9, _PCIE4, (8, 6), "NVIDIA GA102 whitepaper"),
        Card("RTX-A5000", 24, 23.5, 111.1e12, 768e9, _PCIE4, (8, 6), "NVIDIA RTX A5000 data sheet"),
        Card("RTX-A4000", 16, 15.5, 76.7e12, 448e9, _PCIE4, (8, 6), "NVIDIA RTX A4000 data sheet"),
        Card("RTX-5090", 32, 31.3, 209.5e12, 1.792e12, _PCIE5, (12, 0), "NVIDIA RTX Blackwell whitepaper"),
        Card("RTX-5080", 16, 15.4, 112.6e12, 960e9, _PCIE5, (12, 0), "NVIDIA RTX Blackwell whitepaper"),
        Card("RTX-5070-TI", 16, 15.4, 87.9e12, 896e9, _PCIE5, (12, 0), "NVIDIA RTX Blackwell whitepaper"),
        Card("RTX-5070", 12, 11.4, 61.7e12, 672e9, _PCIE5, (12, 0), "NVIDIA RTX Blackwell whitepaper"),
        Card("RTX-5060-TI-16GB", 16, 15.4, 47.4e12, 448e9, _PCIE5_8, (12, 0), _page(5060)),
        Card("RTX-5060-TI-8GB", 8, 7.5, 47.4e12, 448e9, _PCIE5_8, (12, 0), _page(5060)),
        Card("RTX-4090", 24, 23.5, 165.2e12, 1.008e12, _PCIE4, (8, 9), "NVIDIA Ada whitepaper"),
        Card("RTX-4080-SUPER", 16, 15.5, 104.4e12, 736e9, _PCIE4, (8, 9), _page(4080)),
        Card("RTX-4080", 16, 15.5, 97.5e12, 717e9, _PCIE4, (8, 9), _page(4080)),
        Card("RTX-4070-TI-SUPER", 16, 15.5, 88.2e12, 672e9, _PCIE4, (8, 9), _page(4070)),
        Card("RTX-4070-TI", 12, 11.5, 80.2e12, 504e9, _PCIE4, (8, 9), _page(4070)),
        Card("RTX-4070-SUPER", 12, 11.5, 71e12, 504e9, _PCIE4, (8, 9), _page(4070)),
        Card("RTX-4070", 12, 11.5, 58.3e12, 504e9, _PCIE4, (8, 9), _page(4070)),
        Card("RTX-4060-TI-16GB", 16, 15.5, 44.1e12, 288e9, _PCIE4_8, (8, 9), _page(4060)),
        Card("RTX-4060-TI-8GB", 8, 7.6, 44.1e12, 288e9, _PCIE4_8, (8, 9), _page(4060)),
        Card("RTX-4060", 8, 7.6, 30.2e12, 272e9, _PCIE4_8, (8, 9), _page(4060)),
        Card("RTX-3090-TI", 24, 23.5, 80e12, 1.008e12, _PCIE4, (8, 6), _page(3090)),
        Card("RTX-3090", 24, 23.5, 71e12, 936e9, _PCIE4, (8, 6), "NVIDIA GA102 whitepaper"),
        Card("RTX-3080-TI", 12, 11.6, 68.2e12, 912e9, _PCIE4, (8, 6), _page(3080)),
        Card("RTX-3080", 10, 9.6, 59.5e12, 760e9, _PCIE4, (8, 6), "NVIDIA GA102 whitepaper"),
        Card("RTX-3070", 8, 7.6, 40.6e12, 448e9, _PCIE4, (8, 6), "NVIDIA GA102 whitepaper"),
        Card("RTX-3060-TI", 8, 7.6, 32.4e12, 448e9, _PCIE4, (8, 6), _page(3060)),
        Card("RTX-3060", 12, 11.6, 25.5e12, 360e9, _PCIE4, (8, 6), _page(3060)),
        Card("RTX-5090-LAPTOP", 24, 23.4, 90.7e12, 896e9, _PCIE5_8, (12, 0), _MOBILE),
        Card("RTX-5080-LAPTOP", 16, 15.4, 70.3e12, 896e9, _PCIE5_8, (12, 0), _MOBILE),
        Card("RTX-5070-TI-LAPTOP", 12, 11.4, 52.3e12, 672e9, _PCIE5_8, (12, 0), _MOBILE),
        Card("RTX-4090-LAPTOP", 16, 15.5, 79.4e12, 576e9, _PCIE4_8, (8, 9), _MOBILE),
        Card("RTX-4080-LAPTOP", 12, 11.5, 67.7e12, 432e9, _PCIE4_8, (8, 9), _MOBILE),
        Card("RTX-4070-LAPTOP", 8, 7.6, 40.1e12, 256e9, _PCIE4_8, (8, 9), _MOBILE),
        Card("RTX-4060-LAPTOP", 8, 7.6, 29.1e12, 256e9, _PCIE4_8, (8, 9), _MOBILE),
        Card("T4", 16, 14.7, 65e12, 320e9, _PCIE3, (7, 5), "NVIDIA T4 data sheet", shares=_BEFORE_AMPERE),
        Card("QUADRO-RTX-6000", 24, 21.9, 130.5e12, 672e9, _PCIE3, (7, 5), _TURING, shares=_BEFORE_AMPERE),
        Card(
            "TITAN-RTX", 24, 23.4, 130.5e12, 672e9, _PCIE3, (7, 5), "NVIDIA GA102 whitepaper",
            shares=_BEFORE_AMPERE,
        ),
        Card("RTX-2080-TI", 11, 10.5, 53.8e12, 616e9, _PCIE3, (7, 5), _TURING, shares=_BEFORE_AMPERE),
        Card("V100-32GB", 32, 31.7, 125e12, 900e9, _PCIE3, (7, 0), "NVIDIA V100 data sheet", shares=_BEFORE_AMPERE),
        Card("V100-16GB", 16, 15.7, 125e12, 900e9, _PCIE3, (7, 0), "NVIDIA V100 data sheet", shares=_BEFORE_AMPERE),
    )
}  # fmt: skip
"""Known cards by name, those with most memory first in each class."""

_ALSO = {
    "NVIDIA GH200 480GB": "GH200",  # these 480 GB are the host's
    # slower than the row's card in links to other GPUs only
    "H800": "H100-80GB",
    "A800": "A100-80GB",
    "NVIDIA A800-SXM4-80GB": "A100-80GB",
}
"""Names that mean a row without saying so."""

_SILENT = {
    "nvidia", "geforce", "tesla", "rtx", "gpu", "generation", "blackwell", "workstation", "edition",
    "hbm2", "hbm2e", "hbm3", "hbm3e", "sxm", "sxm2", "sxm3", "sxm4", "sxm5", "sxm6", "ac", "ml",
}  # fmt: skip
"""Words of a name that no two rows of the table differ in."""

_OFTEN_SAID = {"pcie", "quadro"}
"""Words that tell some rows from others, and are said of further cards as well."""

_OTHER_MAKERS = re.compile(
    r"\b(amd|instinct|radeon|rx|mi\d{2,3}\w*|intel|arc|gaudi\d*|habana|apple|m[1-5]|mps|tpu|trainium\d*|cpu)\b"
)
"""Words that only name what is not NVIDIA's."""


def _read(name: str) -> tuple[frozenset[str], int | None]:
    """The words that tell a card from others, and the gigabytes that the name speaks of."""
    text = re.sub(r"(\d)(ti|super)\b", r"\1 \2", name.lower().replace("rtx", " rtx "))
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


def find_card(name: str, memory_bytes: float | None = None) -> Card:
    """The card that a name means, as people, torch or nvidia-smi say it: `h100`, `NVIDIA A100-SXM4-80GB`, `4090`.

    Args:
        memory_bytes: of the card, where it is known: that tells apart what is called the same.

    Raises:
        UserError: no row of `CARDS` has that name, or two have.
    """
    words, size = _read(name)
    also = next((card for said, card in _ALSO.items() if _read(said) == (words, size)), None)
    if also is not None:
        return CARDS[also]
    by_words = _named(words) or _named(words - _OFTEN_SAID)
    found = [card for card in by_words if size is None or abs(card.gb - size) <= 0.1 * card.gb]
    if len(found) > 1 and memory_bytes is not None:
        as_large = [
            card for card in found if abs(card.memory_bytes - memory_bytes) <= 0.1 * card.memory_bytes
        ]
        found = as_large or found
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"{name!r} is a card of {' or '.join(f'{card.gb} GB' for card in found)}.",
            hint=f"Say {' or '.join(card.name for card in found)}.",
        )
    _refuse_what_cannot_be_planned(name)
    near = [card.name for card in by_words] or _sharing(words) or _like(words)
    listed = ", ".join(near or CARDS)
    raise UserError(
        f"There is no GPU called {name!r} in the table of cards.",
        hint=f"{'Nearest' if near else 'Known'}: {listed}.",
    )


def _named(words: frozenset[str]) -> list[Card]:
    """The cards of which a name says these words, whatever their memory."""
    return [card for card in CARDS.values() if words and _read(card.name)[0] == words]


def _refuse_what_cannot_be_planned(name: str) -> None:
    """Say of what is no card of the table's kind that this is so, in place of a card that happens to be spelt alike.

    Raises:
        UserError: it is no NVIDIA GPU, or one of which a plan would be wrong.
    """
    said = name.lower()
    if _OTHER_MAKERS.search(said):
        raise UserError(
            f"{name!r} is no NVIDIA GPU, and the table of cards has no others.",
            hint="Fused layers and the figures of a plan are NVIDIA's; nothing was ever measured elsewhere.",
        )
    part = re.search(r"\bmig\b(?:\s*\d+g\.(\d+)gb)?", said)
    if part:
        raise UserError(
            f"{name!r} is a part of a GPU, and the table of cards has whole ones.",
            hint=f"Name the whole card, and give the memory of the part with memory.budget='{part[1] or 20} GB'; "
            "it will be slower than planned.",
        )
    if re.search(r"\bgb10\b|\bspark\b|\bthor\b|\borin\b|\bjetson\b", said):
        raise UserError(
            f"{name!r} shares its memory with the processor, and a plan takes the two to be apart.",
            hint="Its memory can be planned with --gpu of a card that has as much, such as B200, and "
            "memory.budget='100 GiB'; speeds cannot.",
        )


def _sharing(words: frozenset[str]) -> list[str]:
    """Names of the cards that share most words with a name, its number among them."""
    numbers = {word for word in words if re.search(r"\d", word)}
    shared = {name: words & _read(name)[0] for name in CARDS}
    counts = {name: len(same) for name, same in shared.items() if same & numbers}
    return [name for name, count in counts.items() if count == max(counts.values())]


def _like(words: frozenset[str]) -> list[str]:
    """Names of cards whose words are written like these."""
    plain = {"".join(sorted(_read(card)[0])): card for card in CARDS}
    return [plain[key] for key in difflib.get_close_matches("".join(sorted(words)), plain, n=3, cutoff=0.5)]
