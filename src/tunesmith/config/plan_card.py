"""The card that a plan is for: the one that is named, this machine's, or one that many rent. Torch-free."""

from __future__ import annotations

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
        UserError: the table has no such card.
    """
    if gpu is not None:
        return ChosenCard(find_card(gpu))
    here = ask_nvidia_smi()
    if not here:
        return ChosenCard(CARDS[USUAL], "no GPU is here; name another with --gpu")
    try:
        card = find_card(here[0]["name"])
    except UserError:
        raise UserError(
            f"This machine's {here[0]['name']} is not in the table of cards.",
            hint=f"Name the one that is most like it with --gpu: {', '.join(CARDS)}.",
        ) from None
    import psutil

    return ChosenCard(card, "this machine's", pinnable(psutil.virtual_memory().available))
