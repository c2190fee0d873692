"""Values that an argument may have, looked at before anything is loaded.

What the libraries below would take in silence (a negative dropout), refuse in words of their own (a rank of 0) or
fail on in their own depths (a bias of True) is one sentence here.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from tunesmith.contracts.errors import UserError
from tunesmith.settings.rope import KINDS, RopeScaling, scaling_problems


class Values(NamedTuple):
    """Which values are possible, as a test and in words that follow "has to be"."""

    possible: Callable[[Any], bool]
    words: str


def _is_whole(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, Sequence | set) and all(
        isinstance(part, kind) and not isinstance(part, bool) for part in value
    )


_LENGTH = Values(lambda value: _is_whole(value, 1), "a whole number from 1 up")
_RANK = _LENGTH
_ALPHA = Values(lambda value: _is_number(value) and value > 0, "a number above 0")

LOADED: dict[str, Values] = {
    "model_name": Values(
        lambda value: isinstance(value, str | os.PathLike) and str(value) != "",
        "a hub id, a folder or a file",
    ),
    "max_seq_length": _LENGTH,
    "rope_scaling": Values(
        lambda value: value is None or isinstance(value, Mapping),
        'a dict such as {"rope_type": "linear", "factor": 2.0}',
    ),
}
"""Arguments of `from_pretrained`."""

ADAPTED: dict[str, Values] = {
    "r": _RANK,
    "target_modules": Values(
        lambda value: value is None or (len(value) > 0 and (isinstance(value, str) or _is_list(value, str))),
        'None, "all-linear", a list of name endings or a regular expression',
    ),
    "lora_alpha": _ALPHA,
    "lora_dropout": Values(
        lambda value: _is_number(value) and 0 <= value < 1, "a number from 0 up and below 1"
    ),
    "bias": Values(lambda value: value in ("none", "all", "lora_only"), "'none', 'all' or 'lora_only'"),
    "layers_to_transform": Values(
        lambda value: value is None or _is_whole(value, 0) or _is_list(value, int),
        "None, a number of a decoder layer, or a list of them",
    ),
    "random_state": Values(lambda value: _is_whole(value, 0), "a whole number from 0 up"),
    "max_seq_length": Values(lambda value: value is None or _LENGTH.possible(value), f"None or {_LENGTH.words}"),
    "rank_pattern": Values(
        lambda value: all(map(_RANK.possible, (value or {}).values())), f"a dict of which each value is {_RANK.words}"
    ),
    "alpha_pattern": Values(
        lambda value: all(map(_ALPHA.possible, (value or {}).values())),
        f"a dict of which each value is {_ALPHA.words}",
    ),
    "trainable_token_indices": Values(
        lambda value: value is None or isinstance(value, Mapping) or _is_list(value, int),
        "a list of ids of tokens",
    ),
}  # fmt: skip
"""Arguments of `get_peft_model`."""


def check_values(function: str, table: Mapping[str, Values], given: Mapping[str, Any]) -> None:
    """Refuse values that an argument cannot have.

    Args:
        function: named in the message.
        table: `LOADED` or `ADAPTED`.
        given: arguments by name; those that stand not in the table may have any value.

    Raises:
        UserError: with what is possible.
    """
    for name, values in table.items():
        try:
            possible = name not in given or values.possible(given[name])
        except (AttributeError, TypeError):  # it is not even of the kind that the test asks about
            possible = False
        if not possible:
            raise UserError(f"{function}: {name} is {given[name]!r}, and has to be {values.words}.")


def check_source(name: str, revision: str | None) -> None:
    """Refuse a file that is not there, and a revision of what lies on the disk.

    Raises:
        UserError: with what to do.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and not path.exists():
        raise UserError(f"model_name: there is no file {path}.", hint="Check the path.")
    if revision is not None and path.exists():
        raise UserError(
            f"revision={revision!r} is for models on the hub, and {path} lies on the disk.",
            hint="Leave it out.",
        )


def check_rope(scaling: Mapping[str, Any] | None) -> None:
    """Refuse a scaling of rotary positions without a kind, of an unknown one, or without what its kind needs.

    Raises:
        UserError: with what there is, or what is missing.
    """
    if not scaling:
        return
    kinds = sorted(KINDS)
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind is None:
        raise UserError(
            f"rope_scaling={dict(scaling)!r} does not say how.",
            hint=f'Add "rope_type", one of {", ".join(kinds)}.',
        )
    if kind not in kinds:
        near = difflib.get_close_matches(str(kind), kinds, n=1)
        raise UserError(
            f"rope_scaling: there is no rope_type {kind!r}.",
            hint=f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(kinds)}.",
        )
    given = {name: value for name, value in scaling.items() if name != "type"} | {"rope_type": kind}
    try:
        problems = scaling_problems(RopeScaling.model_validate(given).parameters())
    except ValidationError as error:
        first = error.errors()[0]
        place = first["loc"][0]
        if first["type"] == "extra_forbidden":
            raise UserError(
                f"rope_scaling: there is no parameter {place!r}.",
                hint=f"{kind} has {', '.join((*KINDS[kind].needs, *KINDS[kind].takes))}.",
            ) from None
        raise UserError(f"rope_scaling: {place} is {given[str(place)]!r}: {first['msg']}.") from None
    for _, found, expected in problems:
        raise UserError(f"rope_scaling: {found}.", hint=f"{expected[0].upper()}{expected[1:]}.")


def names(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """Several names; one alone needs no list around it."""
    return (given,) if isinstance(given, str) else tuple(given or ())
