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
        ("H100 NVL", "Nearest: H100-80GB, H100-PCIE."),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "Nearest: RTX-4090."),
        ("RTX 4080", "Nearest: RTX-4090, A40, V100-16GB."),
    ],
)
def test_what_is_not_one_card_is_refused_with_those_near_it(said, hint):
    with pytest.raises(UserError) as caught:
        find_card(said)
    assert caught.value.hint == hint
    assert repr(said) in caught.value.message


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


@pytest.mark.parametrize("card", CARDS.values(), ids=list(CARDS))
def test_figures_are_of_one_order(card):
    sold = card.gb * 1e9 / 2**30
    assert 0.85 * sold < card.gib < 1.08 * sold
    assert card.memory_bytes == int(card.gib * 2**30)
    assert 20e12 < card.tensor < 3e15
    assert 60 < card.tensor / card.bandwidth < 500
    assert card.source
