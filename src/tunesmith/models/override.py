"""Methods of an instance's own, in place of those of its class, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any


def override(owner: Any, name: str, function: Callable[..., Any], undo: list[Callable[[], None]]) -> None:
    """Give an instance a method of its own; `undo` gets what brings back the one it had, its own or its class's."""
    if name in vars(owner):
        undo.append(partial(setattr, owner, name, vars(owner)[name]))
    else:
        undo.append(partial(_drop, owner, name))  # of the owner: a deep copy undoes its own
    setattr(owner, name, MethodType(function, owner))


def _drop(owner: Any, name: str) -> None:
    vars(owner).pop(name, None)
