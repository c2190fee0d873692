"""The card that a plan is for: the one that is named, this machine's, or one that many rent. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tunesmith.config.nvidia_smi import ask_nvidia_smi
from tunesmith.contracts.errors import UserError
from tunesmith.planning.cards import CARDS, Card, find_card
from tunesmith.planning.fit import pinnable
from tunesmith.planning.host import free_host_memory

USUAL = "H100-80GB"
"""Where nothing is named and no GPU is here."""


@dataclass(frozen=True, slots=True)
class ChosenCard:
    """A card and why it is this one.

    Attributes:
        card: a row of `CARDS`.
        why: in words, empty where the user named it.
        host_bytes: memory of its machine that may be pinned.
        host_known: whether that is this machine's or was named; otherwise it follows from `HOST_SHARE`.
    """

    card: Card
    why: str
    host_bytes: int
    host_known: bool


HOST_SHARE = 2
"""A machine that nothing is known of is taken to have so many bytes free for each of the card's: eight H100s mostly
come with three times theirs, a card for games with two or three times its own."""


def choose_card(gpu: str | None, host_memory: int | None = None) -> ChosenCard:
    """The card that is asked for, else the first of this machine, else `USUAL`.

    Args:
        gpu: as people, torch or nvidia-smi call it.
        host_memory: free bytes of its machine, None where nobody says.

    Raises:
        UserError: the table has no such card, or several that are called so.
    """
    here = ask_nvidia_smi() if gpu is None else []
    if here:
        card, why = _card_of(here[0]), "this machine's"
    elif gpu is None:
        card, why = CARDS[USUAL], "no GPU is here; name another with --gpu"
    else:
        card, why = find_card(gpu), ""
    free = host_memory
    if free is None and here:
        free = free_host_memory()
    return ChosenCard(
        card, why, pinnable(HOST_SHARE * card.memory_bytes if free is None else free), free is not None
    )


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
