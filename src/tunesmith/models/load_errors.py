"""Why a model or a tokenizer could not be loaded, in one sentence that says what to do.

Hub failures (no such model, gated, no network) come as a dozen exception types, mostly inside one another.
"""

from __future__ import annotations

import errno
import re
from pathlib import Path

import torch
from safetensors import SafetensorError

from tunesmith.contracts.errors import UserError, first_line

LOAD_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    ImportError,
    SafetensorError,
)
"""What loading a model raises, apart from its own refusals."""


def explain(name: str, error: Exception) -> UserError:
    """A sentence for a failure to load `name`."""
    from huggingface_hub import errors as hub

    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    text = " ".join(str(link) for link in chain)

    def caused_by(*types: type[BaseException]) -> bool:
        return any(isinstance(link, types) for link in chain)

    if caused_by(hub.GatedRepoError) or "gated repo" in text.lower():
        return UserError(
            f"model.name: {name} is gated on the Hugging Face hub, and you have no access with this login.",
            hint=f"Ask for access at https://huggingface.co/{name}, then run `hf auth login` or set HF_TOKEN.",
        )
    if (
        caused_by(hub.RepositoryNotFoundError, hub.HFValidationError)
        or "not a valid model identifier" in text
    ):
        return UserError(
            f"model.name: {name} is neither a local folder nor a model on the Hugging Face hub that you can see.",
            hint="Check the spelling; a private model needs `hf auth login` or HF_TOKEN.",
        )
    if caused_by(hub.RevisionNotFoundError):
        return UserError(f"model.revision: {name} has no such branch, tag or commit.")
    if (
        caused_by(hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, ConnectionError)
        or "t connect to" in text
    ):
        return UserError(
            f"model.name: {name} is not a local folder, and the Hugging Face hub cannot be reached.",
            hint="Check the network (and HF_HUB_OFFLINE), or give a local folder.",
        )
    if "trust_remote_code" in text:
        return UserError(
            f"model.name: {name} ships its own Python code, which is not run unless you ask for it.",
            hint="Read that code, then set model.trust_remote_code: true.",
        )
    return _explain_files(name, error, text)


def _explain_files(name: str, error: Exception, text: str) -> UserError:
    """A sentence for files that are there (or not) and cannot be used."""
    if isinstance(error, SafetensorError):
        return UserError(
            f"model.name: the weights of {name} are damaged: {first_line(error)}.",
            hint="Fetch the model again; the download or the copy was probably cut off.",
        )
    shard = re.search(r"\S*-\d+-of-\d+\.safetensors", text)
    if shard:
        return UserError(
            f"model.name: {name} is incomplete: its index names {Path(shard[0]).name}, which is not there.",
            hint="Fetch the model again.",
        )
    if "Unrecognized configuration class" in text:
        return UserError(f"model.name: {name} is no causal language model that transformers knows.")
    if "ignore_mismatched_sizes" in text:
        return UserError(
            f"model.name: weights of {name} have other shapes than its config.json says.",
            hint="Use the config.json that belongs to these weights.",
        )
    if "safetensors" in text or "does not appear to have a file named" in text:
        return UserError(
            f"model.name: {name} has no weights in safetensors, and pickled weights are not loaded.",
            hint="Convert them once: load the model with transformers where you trust it, and save_pretrained.",
        )
    return UserError(f"model.name: {name} cannot be loaded: {first_line(error)}")


def is_no_fault_of_the_model(error: Exception) -> bool:
    """Too little memory or disk: the command line has a sentence of its own for these."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or isinstance(error, torch.OutOfMemoryError)
