"""The `config.json` that a plan is made from: a folder's, the one in the hub's cache, a public model's, or the hub's.

Torch-free, and without network for all but the last. Weights are never fetched.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.contracts.errors import UserError
from tunesmith.contracts.hub import offline_if_unreachable
from tunesmith.contracts.model_folder import local_folder
from tunesmith.planning.known_models import MODELS, published_config


@dataclass(frozen=True, slots=True)
class FoundConfig:
    """A parsed `config.json`.

    Attributes:
        values: what it says.
        where: where it is from, for people.
    """

    values: dict[str, Any]
    where: str


def find_config(name: str, revision: str | None = None) -> FoundConfig:
    """The config of a model, from the nearest place that has it.

    Args:
        name: as `model.name` has it, and so has `revision`.

    Raises:
        UserError: it is nowhere, or cannot be read.
    """
    folder = local_folder(name)
    if folder is not None:
        return FoundConfig(_read(folder / "config.json", name), str(folder))
    cached = cached_config(name, revision)
    if cached is not None:
        return FoundConfig(_read(cached, name), "the Hugging Face cache")
    published = published_config(name) if revision is None else None
    if published is not None:
        return FoundConfig(published, "the table of public models")
    return FoundConfig(_read(_from_hub(name, revision), name), "the Hugging Face hub")


def _read(file: Path, name: str) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or type(error).__name__
    except UnicodeDecodeError:
        reason = "it is no text in UTF-8"
    except json.JSONDecodeError as error:
        reason = f"it is no JSON, from line {error.lineno}, column {error.colno} on"
    except (RecursionError, ValueError):  # brackets without end, a number of thousands of digits
        reason = "it is no JSON that a model has"
    else:
        if isinstance(values, dict):
            return values
        reason = "it holds no names and values"
    raise UserError(f"model.name: the config.json of {name} cannot be read: {reason}.")


def cached_config(name: str, revision: str | None) -> Path | None:
    """The `config.json` of a model in the hub's cache; None where it is not there. The hub is not asked.

    Args:
        name: as `model.name` has it, and so has `revision`.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:  # no hub id either, which whoever asks the hub says better
        return None
    return Path(cached) if isinstance(cached, str) else None


def _from_hub(name: str, revision: str | None) -> Path:
    """The config alone, fetched with the token of the environment where there is one."""
    from huggingface_hub import errors, hf_hub_download

    unknown = UserError(
        f"model.name: {name} is neither a local folder nor a model on the Hugging Face hub that you can see.",
        hint=_near(name) or "Check the spelling; a private model needs `hf auth login` or HF_TOKEN.",
    )
    if name.count("/") != 1:
        raise unknown
    unreachable = UserError(
        f"model.name: {name} is no local folder, no public model that is known here, and the Hugging Face hub "
        "cannot be reached.",
        hint=_near(name) or "Check the network (and HF_HUB_OFFLINE), or give a folder with its config.json.",
    )
    if offline_if_unreachable():
        raise unreachable
    try:
        return Path(hf_hub_download(name, "config.json", revision=revision))
    except errors.GatedRepoError:
        raise UserError(
            f"model.name: {name} is gated on the Hugging Face hub, and you have no access with this login.",
            hint=f"Ask for access at https://huggingface.co/{name}, then run `hf auth login` or set HF_TOKEN.",
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"model.revision: {name} has no such branch, tag or commit.") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise unknown from None
    except errors.LocalEntryNotFoundError:
        raise unreachable from None
    except errors.EntryNotFoundError:
        raise UserError(
            f"model.name: {name} has no config.json, so it is no model of transformers."
        ) from None
    except OSError:
        raise unreachable from None


def _near(name: str) -> str | None:
    """The public model that is spelt almost so."""
    lower = {known.lower(): known for known in MODELS}
    near = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.85)
    return f"Did you mean {lower[near[0]]}?" if near else None
