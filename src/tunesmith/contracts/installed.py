"""Whether a module is installed, without importing it. Torch-free."""

from __future__ import annotations

from importlib.util import find_spec


def is_installed(module: str) -> bool:
    """Whether a module could be imported; one that is half removed could not."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # half removed
        return False
