"""The card that a plan is for: the one that is named, this machine's, or one that many rent. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tunesmith.config.nvidia_smi import ask_nvidia_smi
from tunesmith.contracts.errors import UserError
from tunesmith.planning.cards import CARDS, Card, find_card
from tunesmith.planning.fit import pinnable

USUAL = "H100-80GB"
"""Where nothing is named and no GPU is here."""


@dataclass(frozen=True, slots=True)
class ChosenCard:
    """A card and why it is this one.

    Attributes:
        card: a row of `CARDS`.
        why: in words, empty where the user named it.
        host_bytes: memory of this machine that may be pinned where the card is in it; None elsewhere.
    """

    card: Card
    why: str = ""
    host_bytes: int | None = None


def choose_card(gpu: str | None) -> ChosenCard:
    """The card that is asked for, else the first of this machine, else `USUAL`.

    Args:
        gpu: as people, torch or nvidia-smi call it.

    Raises:
        UserError: the table has no such card, or several that are called so.
    """
    if gpu is not None:
        return ChosenCard(find_card(gpu))
    here = ask_nvidia_smi()
    if not here:
        return ChosenCard(CARDS[USUAL], "no GPU is here; name another with --gpu")
    import psutil

    return ChosenCard(_card_of(here[0]), "this machine's", pinnable(psutil.virtual_memory().available))


def _card_of(gpu: Mapping[str, str]) -> Card:
    """The row of `CARDS` for a GPU of this machine.

    Args:
        gpu: a row of `ask_nvidia_smi`.

    Raises:
        UserError: the table has no such card, or several that neither its name nor its memory tells apart.
    """
    mebibytes = gpu["memory.total"]  # no number where memory is the processor's
    try:
        return find_card(gpu["name"], int(mebibytes) * 2**20 if mebibytes.isdecimal() else None)
    except UserError as error:
        raise UserError(
            f"This machine's GPU cannot be planned for. {error.message}",
            hint=f"{error.hint} --gpu NAME plans for the card that it names.",
        ) from None
