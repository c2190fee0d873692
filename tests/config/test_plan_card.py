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


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with half of its memory free, and the GPU of somebody who plays."""
    monkeypatch.setattr(plan_card, "ask_nvidia_smi", lambda: [{"name": "NVIDIA GeForce RTX 4090"}])
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB, available=32 * GIB))


def test_of_this_machine_half_of_what_is_free_may_be_pinned() -> None:
    """As of a run that is planned where it runs (`fit_run.plan_fit`)."""
    chosen = choose_card(None)
    assert (chosen.card, chosen.why) == (CARDS["RTX-4090"], "this machine's")
    assert chosen.host_bytes == 16 * GIB


def test_of_another_machine_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    named = choose_card("RTX 4090")
    assert (named.card, named.why, named.host_bytes) == (CARDS["RTX-4090"], "", None)
    monkeypatch.setattr(plan_card, "ask_nvidia_smi", list)
    usual = choose_card(None)
    assert (usual.card, usual.host_bytes) == (CARDS[USUAL], None)
    assert usual.why


def test_a_card_of_this_machine_that_no_row_is_about_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_card, "ask_nvidia_smi", lambda: [{"name": "NVIDIA Riva TNT"}])
    with pytest.raises(UserError, match="Riva TNT is not in the table"):
        choose_card(None)
