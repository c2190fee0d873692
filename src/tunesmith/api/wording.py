"""Errors of the layers below speak of a run file's settings; a caller in Python has arguments."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from tunesmith.contracts.errors import UserError

ARGUMENTS = {
    "model.trust_remote_code: true": "trust_remote_code=True",
    "model.name": "model_name",
    "model.quantize: int8": "load_in_8bit",
    "model.quantize: nf4": "load_in_4bit",
    "model.revision": "revision",
    "model.rope_scaling": "rope_scaling",
    "adapter.path": "model_name",
    "adapter.targets": "target_modules",
    "adapter.init_lora_weights": "init_lora_weights",
    "adapter.layers_to_transform": "layers_to_transform",
    "adapter.modules_to_save": "modules_to_save",
    "adapter.rank_pattern": "rank_pattern",
    "adapter.exclude_modules": "exclude_modules",
    "adapter.trainable_token_indices": "trainable_token_indices",
    "adapter.alpha_pattern": "alpha_pattern",
    "adapter.new_tokens": "new_tokens",
    "adapter.use_dora": "use_dora",
}
"""A setting, and the argument that says the same."""

_SETTING = re.compile("|".join(re.escape(setting) for setting in ARGUMENTS))


@contextmanager
def in_arguments() -> Iterator[None]:
    """Within the block a `UserError` names arguments in place of settings."""
    try:
        yield
    except UserError as error:
        message, hint = (
            None if text is None else _SETTING.sub(lambda found: ARGUMENTS[found[0]], text)
            for text in (error.message, error.hint)
        )
        assert message is not None
        # one traceback is enough: the same sentence in other words says nothing more
        raise UserError(message, hint=hint, exit_code=error.exit_code) from error.__cause__
