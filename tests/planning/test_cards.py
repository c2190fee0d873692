"""Cards are found by what people, torch and nvidia-smi call them, and say what they reach."""

from __future__ import annotations

import pytest

from tunesmith.contracts.errors import UserError
from tunesmith.planning.cards import CARDS, find_card


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("h100", "H100-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("H100-SXM5-80GB", "H100-80GB"),
        ("NVIDIA H100 PCIe", "H100-PCIE"),
        ("NVIDIA H200", "H200"),
        ("H200 141 GiB", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100-40GB"),
        ("a100 80", "A100-80GB"),
        ("a100_40g", "A100-40GB"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("rtx4090", "RTX-4090"),
        ("4090", "RTX-4090"),
        ("RTX 4090 24 GB", "RTX-4090"),
        ("NVIDIA RTX A6000", "RTX-A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX-6000-ADA"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-16GB", "V100-16GB"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A10G", "A10G"),
        ("B200 192GB", "B200"),
        ("NVIDIA B300 SXM6 AC", "B300"),
        ("B300 288GB", "B300"),
        ("NVIDIA H100 NVL", "H100-NVL"),
        ("NVIDIA H200 NVL", "H200-NVL"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("GH200", "GH200"),
        ("NVIDIA H800", "H100-80GB"),
        ("NVIDIA A800-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX-PRO-6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "RTX-PRO-6000-MAX-Q"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX-PRO-6000-SERVER"),
        ("Quadro RTX 6000", "QUADRO-RTX-6000"),
        ("Quadro RTX A6000", "RTX-A6000"),
        ("NVIDIA TITAN RTX", "TITAN-RTX"),
        ("NVIDIA GeForce RTX 3060", "RTX-3060"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX-4070-TI-SUPER"),
        ("rtx 4070ti", "RTX-4070-TI"),
        ("NVIDIA GeForce RTX 5060 Ti 16GB", "RTX-5060-TI-16GB"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "RTX-4090-LAPTOP"),
        ("NVIDIA GeForce RTX 4060 Laptop GPU", "RTX-4060-LAPTOP"),
    ],
)
def test_names_in_use(said, name):
    assert find_card(said).name == name


@pytest.mark.parametrize("name", CARDS)
def test_every_card_by_its_own_name(name):
    assert find_card(name) is CARDS[name]
    assert find_card(f"  nvidia {name.lower().replace('-', ' ')} ") is CARDS[name]


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ("A100", "Say A100-80GB or A100-40GB."),
        ("H100-40GB", "Nearest: H100-80GB."),
        ("NVIDIA GeForce RTX 4060 Ti", "Say RTX-4060-TI-16GB or RTX-4060-TI-8GB."),
        ("H100 XYZ", "Nearest: H100-NVL, H100-80GB, H100-PCIE."),
        ("NVIDIA GeForce RTX 3080 Laptop GPU", "Nearest: RTX-3080-TI, RTX-3080."),
        ("RTX 4900", "Nearest: RTX-4090, RTX-4080, RTX-4070."),
    ],
)
def test_what_is_not_one_card_is_refused_with_those_near_it(said, hint):
    with pytest.raises(UserError) as caught:
        find_card(said)
    assert caught.value.hint == hint
    assert repr(said) in caught.value.message


@pytest.mark.parametrize(
    ("said", "reason", "hint"),
    [
        ("AMD Instinct MI300X", "is no NVIDIA GPU", "nothing was ever measured elsewhere"),
        ("mi325x", "is no NVIDIA GPU", ""),
        ("Radeon RX 7900 XTX", "is no NVIDIA GPU", ""),
        ("Apple M3 Max", "is no NVIDIA GPU", ""),
        ("NVIDIA GB10", "shares its memory with the processor", "memory.budget='100 GiB'"),
        ("DGX Spark", "shares its memory with the processor", ""),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "is a part of a GPU", "memory.budget='10 GB'"),
    ],
)
def test_what_no_plan_can_be_made_for_is_refused_with_the_reason(said, reason, hint):
    with pytest.raises(UserError) as caught:
        find_card(said)
    assert reason in caught.value.message
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize("said", ["fridge", "", "80GB", "nvidia"])
def test_nothing_near_lists_all(said):
    with pytest.raises(UserError) as caught:
        find_card(said)
    assert all(name in str(caught.value.hint) for name in CARDS)


def test_only_what_was_measured_is_not_estimated():
    assert {name for name, card in CARDS.items() if not card.rates().estimated} == {"H100-80GB", "H200"}


def test_rates_are_shares_of_the_sheet():
    h100, a100 = CARDS["H100-80GB"].rates(), CARDS["A100-80GB"].rates()
    assert h100.products == pytest.approx(713e12)
    assert h100.memory == pytest.approx(3.01e12)
    assert h100.host_link == pytest.approx(54e9)
    # the same share of 312 TFLOP/s, 2.039 TB/s and half the link
    assert a100.products == pytest.approx(713e12 * 312 / 989.4)
    assert a100.memory == pytest.approx(3.01e12 * 2.039 / 3.35)
    assert a100.host_link == pytest.approx(27e9)
    # without FlashAttention a card lags further behind its sheet in attention than in GEMMs
    old = CARDS["T4"].rates()
    assert old.attention_forward / old.products < 0.8 * a100.attention_forward / a100.products


@pytest.mark.parametrize(
    ("laptop", "desktop"),
    [
        ("RTX-5090-LAPTOP", "RTX-5080"),
        ("RTX-5080-LAPTOP", "RTX-5080"),
        ("RTX-5070-TI-LAPTOP", "RTX-5070"),
        ("RTX-4090-LAPTOP", "RTX-4080"),
        ("RTX-4080-LAPTOP", "RTX-4070-TI"),
        ("RTX-4070-LAPTOP", "RTX-4060-TI-8GB"),
        ("RTX-4060-LAPTOP", "RTX-4060"),
    ],
)
def test_a_laptop_is_no_faster_than_a_desktop_card_of_its_chip(laptop, desktop):
    assert CARDS[laptop].tensor < CARDS[desktop].tensor
    assert CARDS[laptop].bandwidth <= CARDS[desktop].bandwidth
    assert CARDS[laptop].link <= CARDS[desktop].link


@pytest.mark.parametrize("card", CARDS.values(), ids=list(CARDS))
def test_figures_are_of_one_order(card):
    sold = card.gb * 1e9 / 2**30
    assert 0.85 * sold < card.gib < 1.08 * sold
    assert card.memory_bytes == int(card.gib * 2**30)
    assert 20e12 < card.tensor < 3e15
    assert 35 < card.tensor / card.bandwidth < 500
    assert card.source
