"""Secrets among a trainer's arguments: there for whoever uses them, and in no file.

transformers writes a trainer's arguments as a pickle (`training_args.bin`) beside every checkpoint and every saved
model, and uploads it with them. Rejected: taking the token out of the arguments while a checkpoint is written; the
upload that follows in the same function needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.settings.secrets import HIDDEN, names_a_secret

_NOT_SECRET = ("eos_token", "pad_token")
"""Arguments whose names end as those of secrets do, and that are texts of a tokenizer."""


class Secret(str):
    """A text that a pickle holds as None, and that prints as nothing."""

    __slots__ = ()

    def __reduce_ex__(self, _: object) -> tuple[Any, tuple[()]]:
        return type(None), ()

    def __deepcopy__(self, _: object) -> Secret:
        return self

    def __copy__(self) -> Secret:
        return self

    def __repr__(self) -> str:
        return repr(HIDDEN)


def kept_out(name: str, value: Any) -> Any:
    """The value of an argument, its secrets as `Secret`: `hub_token`, or `token` in a dict of arguments."""
    if isinstance(value, Mapping):
        return {key: kept_out(str(key), inner) for key, inner in value.items()}
    secret = isinstance(value, str) and names_a_secret(name) and name not in _NOT_SECRET
    return Secret(value) if secret else value
