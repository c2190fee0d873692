"""Fine-tune large language models, fast and verifiably, from one YAML file or five lines of Python.

>>> import tunesmith
>>> tunesmith.train("run.yaml")  # doctest: +SKIP

Importing the package imports no torch; what needs it loads it when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunesmith._elsewhere import INSTEAD
from tunesmith._version import __version__

if TYPE_CHECKING:
    from tunesmith.api.data_helpers import get_chat_template, standardize_sharegpt
    from tunesmith.api.language_model import FastLanguageModel, FastModel
    from tunesmith.api.new_tokens import add_new_tokens
    from tunesmith.api.precision import is_bfloat16_supported
    from tunesmith.api.responses import train_on_responses_only
    from tunesmith.api.run import train
    from tunesmith.api.sft_trainer import SFTTrainer
    from tunesmith.config.result import RunResult
    from tunesmith.contracts.errors import ConfigError, UserError

_LAZY = {
    "FastLanguageModel": "tunesmith.api.language_model",
    "FastModel": "tunesmith.api.language_model",
    "SFTTrainer": "tunesmith.api.sft_trainer",
    "add_new_tokens": "tunesmith.api.new_tokens",
    "get_chat_template": "tunesmith.api.data_helpers",
    "is_bfloat16_supported": "tunesmith.api.precision",
    "standardize_sharegpt": "tunesmith.api.data_helpers",
    "train": "tunesmith.api.run",
    "train_on_responses_only": "tunesmith.api.responses",
    "RunResult": "tunesmith.config.result",
    "ConfigError": "tunesmith.contracts.errors",
    "UserError": "tunesmith.contracts.errors",
}

__all__ = [
    "ConfigError",
    "FastLanguageModel",
    "FastModel",
    "RunResult",
    "SFTTrainer",
    "UserError",
    "__version__",
    "add_new_tokens",
    "get_chat_template",
    "is_bfloat16_supported",
    "standardize_sharegpt",
    "train",
    "train_on_responses_only",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its module on first use.

    Raises:
        ImportError: another library has the name; the only error whose words an import statement shows.
    """
    if name not in _LAZY:
        if name in INSTEAD:
            raise ImportError(f"tunesmith has no {name}. {INSTEAD[name]}")
        raise AttributeError(f"module 'tunesmith' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
