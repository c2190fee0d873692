"""How far the loading of weights is, told to whoever shows it.

transformers reads weights in one loop behind a progress bar. A run switches bars of libraries off, and a model of 70
billion parameters takes minutes to load; transformers lets a program take its bars over, which is what this does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

Tell = Callable[[str, bool], None]
"""Gets a line, and whether it stays; one that does not is replaced by the next."""


@contextmanager
def loading_progress(tell: Tell | None) -> Iterator[None]:
    """Within the block `tell` gets a line for each weight that transformers loads.

    Args:
        tell: None leaves transformers' bars as they are.
    """
    if tell is None:
        yield
        return
    from transformers.utils import logging

    def hook(factory: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if args and options.get("desc") == "Loading weights":
            return _told(args[0], tell)
        return factory(*args, **options)

    previous = logging.set_tqdm_hook(hook)
    try:
        yield
    finally:
        logging.set_tqdm_hook(previous)


def _told(weights: Collection[Any], tell: Tell) -> Iterator[Any]:
    """The weights, each told of before it is read."""
    for number, weight in enumerate(weights, 1):
        tell(f"loading weights: {number:,} of {len(weights):,}", False)
        yield weight
