"""Sizes in a `config.json`, and the sentence where one is missing. Torch-free."""

from __future__ import annotations

from types import SimpleNamespace

from tunesmith.contracts.errors import UserError


def needed(config: SimpleNamespace, key: str, name: str, *others: str) -> int:
    """A size that has to be there.

    Args:
        key: its usual name; others: what some families call it.
        name: of the model, for the message.

    Raises:
        UserError: it is under none of the names, or is no whole number above 0.
    """
    for each in (key, *others):
        value = getattr(config, each, None)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise refuse(name, f"its {each} is {value!r} where a whole number above 0 should be")
        return value
    raise missing(name, key)


def optional(config: SimpleNamespace, key: str, name: str, *others: str) -> int | None:
    """A size that may be left out: None where it is under none of the names, or null or 0.

    Args:
        key: its usual name; others: what some families call it; name: of the model, for the message.

    Raises:
        UserError: it is no whole number above 0.
    """
    given = next((each for each in (key, *others) if getattr(config, each, None)), None)
    return None if given is None else needed(config, given, name)


MOST_LAYERS = 1_000
"""Layers beyond which a config is damaged: no model has as many, and a plan has a row for each."""


def layer_count(config: SimpleNamespace, name: str, *others: str) -> int:
    """How many decoder layers there are.

    Args:
        others: what some families call it; name: of the model, for the message.

    Raises:
        UserError: it is missing, no whole number above 0, or too large to be true.
    """
    count = needed(config, "num_hidden_layers", name, *others)
    if count > MOST_LAYERS:
        raise refuse(name, f"it says that there are {count:,} layers")
    return count


def missing(name: str, key: str) -> UserError:
    """The error for a config without a size."""
    return refuse(name, f"it has no {key}")


def refuse(name: str, reason: str) -> UserError:
    """The error for a config that no plan can be made from."""
    return UserError(
        f"No plan can be made from the config.json of {name}: {reason}.",
        hint="It has to be the config.json of a causal language model in the format of transformers.",
    )
