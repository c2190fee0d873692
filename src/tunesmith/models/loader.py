"""Loads a causal model and its tokenizer through transformers, and says in one sentence why it could not.

Weights are read from safetensors only, never from a pickle. Hub failures (no such model, gated, no network) come
as a dozen exception types; `_explain` turns them into what a person can do.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import torch

from tunesmith.contracts.errors import UserError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device() -> torch.device:
    """The first CUDA device, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def choose_dtype(setting: str, device: torch.device) -> torch.dtype:
    """Compute type of a run for `model.dtype`; `auto` takes the fastest that trains without surprises."""
    if setting != "auto":
        return _DTYPES[setting]
    if device.type != "cuda":
        return torch.float32  # bfloat16 is 30–50 times slower on CPUs without matrix units for it
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def _check_local(name: str) -> None:
    """Refuse what looks like a path but is none, before the hub is asked for it."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(
                f"model.name: the folder {path} holds no config.json, so it is not a Hugging Face model.",
                hint="A LoRA adapter goes to adapter.path."
                if (path / "adapter_config.json").is_file()
                else None,
            )
        return
    if path.is_file():
        raise UserError(f"model.name: {path} is a file.", hint="Give the folder that holds config.json.")
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_like_path:
        siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        raise UserError(
            f"model.name: there is no folder {path}.",
            hint=f"Did you mean {path.parent / near[0]}?" if near else None,
        )


def _explain(name: str, error: Exception) -> UserError:
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
    if caused_by(hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, ConnectionError) or "connect" in text:
        return UserError(
            f"model.name: {name} is not a local folder, and the Hugging Face hub cannot be reached.",
            hint="Check the network (and HF_HUB_OFFLINE), or give a local folder.",
        )
    if "trust_remote_code" in text:
        return UserError(
            f"model.name: {name} ships its own Python code, which is not run unless you ask for it.",
            hint="Read that code, then set model.trust_remote_code: true.",
        )
    if "safetensors" in text or "does not appear to have a file named" in text:
        return UserError(
            f"model.name: {name} has no weights in safetensors, and pickled weights are not loaded."
        )
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UserError(f"model.name: {name} cannot be loaded: {first}")


_LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, json.JSONDecodeError)


def load_tokenizer(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The fast tokenizer of a model.

    Raises:
        UserError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    _check_local(name)
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except _LOAD_ERRORS as error:
        raise _explain(name, error) from error


def load_model(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantize: str = "none",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """A causal model on `device`, its weights frozen, in `dtype` or (the linear layers) in NF4.

    Args:
        quantize: `none`, or `nf4` for bitsandbytes' 4-bit NormalFloat with nested scales (QLoRA,
            https://arxiv.org/abs/2305.14314).

    Raises:
        UserError: it does not exist, is gated, cannot be reached, or is no causal language model.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    _check_local(name)
    options: dict[str, Any] = {}
    if quantize == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            device_map={"": str(device)},
            revision=revision,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            **options,
        )
    except _LOAD_ERRORS as error:
        raise _explain(name, error) from error
    _keep_scales_exact(model)
    model.requires_grad_(False)
    return model


def _keep_scales_exact(model: Any) -> None:
    """On CPUs with bfloat16 units bitsandbytes repacks 4-bit weights at the first evaluation and rounds their
    scales to bfloat16 for good: training would go on with other weights than it began with. Switched off."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
