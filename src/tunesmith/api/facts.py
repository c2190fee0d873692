"""What `FastLanguageModel` knows of a model that it made, carried by the model itself."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

from tunesmith.contracts.errors import UserError
from tunesmith.models.attach import Attached
from tunesmith.models.base_of import base_of

_FACTS = "_tunesmith_facts"


@dataclass
class Facts:
    """Of one model.

    Attributes:
        name: what it was loaded from, as it was given.
        full: whether its own weights are trained.
        checkpointing: the last `use_gradient_checkpointing`.
        quiet: whether nothing is printed about it.
        attached: fused layers and door, once they are on.
        stretched: whether its rotary positions are scaled for longer rows than it was made for.
        left_out: rows (what, how, why) of what `target_modules` names and an adapter is not on.
    """

    name: str
    full: bool
    checkpointing: Any
    quiet: bool
    attached: Attached | None = None
    stretched: bool = False
    left_out: list[tuple[str, str, str]] = field(default_factory=list)

    def say(self, *lines: str) -> None:
        """Print lines for the person who runs the script, unless they asked for silence."""
        if not self.quiet:
            print(*lines, sep="\n", flush=True, file=sys.stdout)


def remember(model: Any, facts: Facts) -> None:
    """Have a model carry its facts, below its adapter."""
    setattr(base_of(model), _FACTS, facts)


def facts_of(model: Any) -> Facts | None:
    """The facts of a model of ours; None for any other."""
    if not hasattr(model, "named_modules"):
        return None
    facts: Facts | None = vars(base_of(model)).get(_FACTS)
    return facts


def need_facts(model: Any, function: str) -> Facts:
    """The facts of a model of ours.

    Raises:
        UserError: it was not made by `FastLanguageModel.from_pretrained`.
    """
    facts = facts_of(model)
    if facts is None:
        raise UserError(
            f"{function} takes a model of FastLanguageModel.from_pretrained, and this is a {type(model).__name__}.",
            hint="Load the model with FastLanguageModel.from_pretrained; a local folder works too.",
        )
    return facts
