"""The card that a plan is for, and the memory beside it."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest

from tunesmith.config import plan_card
from tunesmith.config.plan_card import USUAL, choose_card
from tunesmith.contracts.errors import UserError
from tunesmith.planning.cards import CARDS

GIB = 2**30


def gpu(name: str, mebibytes: str) -> dict[str, str]:
    """What nvidia-smi says of one."""
    return {"name": name, "memory.total": mebibytes}


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with half of its memory free, and the GPU of somebody who plays."""
    monkeypatch.setattr(plan_card, "ask_nvidia_smi", lambda: [gpu("NVIDIA GeForce RTX 4090", "24564")])
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB, available=32 * GIB))


def test_of_this_machine_half_of_what_is_free_may_be_pinned() -> None:
    """As of a run that is planned where it runs (`fit_run.plan_fit`)."""
    chosen = choose_card(None)
    assert (chosen.card, chosen.why) == (CARDS["RTX-4090"], "this machine's")
    assert chosen.host_bytes == 16 * GIB

    assert chosen.host_known
    assert choose_card(None, 8 * GIB).host_bytes == 4 * GIB


def test_another_machine_is_taken_to_have_twice_the_cards_memory_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    named = choose_card("RTX 4090")
    assert (named.card, named.why, named.host_known) == (CARDS["RTX-4090"], "", False)
    assert named.host_bytes == named.card.memory_bytes
    monkeypatch.setattr(plan_card, "ask_nvidia_smi", list)
    usual = choose_card(None)
    assert (usual.card, usual.host_known) == (CARDS[USUAL], False)
    assert usual.host_bytes == usual.card.memory_bytes
    assert usual.why
    told = choose_card("RTX 4090", 128 * GIB)
    assert (told.host_bytes, told.host_known) == (64 * GIB, True)


def test_a_card_of_this_machine_that_no_row_is_about_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_card, "ask_nvidia_smi", lambda: [gpu("NVIDIA Riva TNT", "16")])
    with pytest.raises(UserError, match=r"This machine's GPU .* 'NVIDIA Riva TNT' in the table") as caught:
        choose_card(None)
    assert "--gpu NAME" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "mebibytes", "card"),
    [
        ("NVIDIA GeForce RTX 4060 Ti", "8188", "RTX-4060-TI-8GB"),
        ("NVIDIA GeForce RTX 4060 Ti", "16380", "RTX-4060-TI-16GB"),
        ("NVIDIA GeForce RTX 5060 Ti", "16311", "RTX-5060-TI-16GB"),
        ("NVIDIA A100-SXM4-40GB", "40960", "A100-40GB"),
        ("NVIDIA GeForce RTX 4090", "[N/A]", "RTX-4090"),
    ],
)
def test_memory_tells_apart_what_is_called_the_same(monkeypatch, name, mebibytes, card) -> None:
    monkeypatch.setattr(plan_card, "ask_nvidia_smi", lambda: [gpu(name, mebibytes)])
    assert choose_card(None).card == CARDS[card]


@pytest.mark.parametrize("mebibytes", ["12282", "[N/A]"])
def test_what_neither_name_nor_memory_tells_apart_is_asked_for(monkeypatch, mebibytes) -> None:
    monkeypatch.setattr(plan_card, "ask_nvidia_smi", lambda: [gpu("NVIDIA GeForce RTX 4060 Ti", mebibytes)])
    with pytest.raises(UserError, match=r"is a card of 16 GB or 8 GB|is a card of 8 GB or 16 GB") as caught:
        choose_card(None)
    assert "RTX-4060-TI-8GB" in caught.value.hint
    assert "--gpu" in caught.value.hint
