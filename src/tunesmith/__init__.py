"""Fine-tune large language models, fast and verifiably, from one YAML file or five lines of Python.

>>> import tunesmith
>>> tunesmith.train("run.yaml")  # doctest: +SKIP

Importing the package imports no torch; what needs it loads it when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunesmith._version import __version__

if TYPE_CHECKING:
    from tunesmith.api.run import train
    from tunesmith.config.result import RunResult
    from tunesmith.contracts.errors import ConfigError, UserError

_LAZY = {
    "train": "tunesmith.api.run",
    "RunResult": "tunesmith.config.result",
    "ConfigError": "tunesmith.contracts.errors",
    "UserError": "tunesmith.contracts.errors",
}

__all__ = ["ConfigError", "RunResult", "UserError", "__version__", "train"]


def __getattr__(name: str) -> Any:
    """Load a public name from its module on first use."""
    if name not in _LAZY:
        raise AttributeError(f"module 'tunesmith' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
