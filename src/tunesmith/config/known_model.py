"""The config of a model that is on this machine: what can be said of it before anything is loaded or fetched."""

from __future__ import annotations

from typing import Any

from tunesmith.config.plan_model import cached_config
from tunesmith.contracts.errors import UserError, first_line
from tunesmith.contracts.model_folder import local_folder


def known_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The config of the language model in a local folder or in the hub's cache; None where it is in neither.

    The hub is not asked.

    Args:
        name: as `model.name` has it, and so have the others.

    Raises:
        UserError: it looks like a folder and is none, holds no model, or its `config.json` cannot be read.
    """
    from transformers import AutoConfig

    where = local_folder(name)
    if where is None:
        cached = cached_config(name, revision)
        if cached is None:
            return None
        where = cached.parent
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.name: the config.json of {name} cannot be read: {first_line(error)}."
        ) from error
    return config.get_text_config()
