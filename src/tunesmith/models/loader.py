"""Loads a causal model and its tokenizer through transformers, and says in one sentence why it could not.

Weights are read from safetensors only, never from a pickle. Hub failures (no such model, gated, no network) come
as a dozen exception types; `_explain` turns them into what a person can do.
"""

from __future__ import annotations

import difflib
import errno
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError

from tunesmith.contracts.errors import UserError
from tunesmith.contracts.hub import offline_if_unreachable

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


def local_folder(name: str) -> Path | None:
    """The local folder that `model.name` is; None for what can only be a hub id, which is not asked for.

    Raises:
        UserError: there is no such folder, or it holds no model.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(
                f"model.name: the folder {path} holds no config.json, so it is not a Hugging Face model.",
                hint="A LoRA adapter goes to adapter.path."
                if (path / "adapter_config.json").is_file()
                else _inside(path),
            )
        return path
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
    return None


def _local_or_hub(name: str) -> str:
    """The folder or hub id to load from; what looks like a path but is none is refused before the hub is asked.

    Raises:
        UserError: there is no such folder, or it holds no model.
    """
    folder = local_folder(name)
    if folder is None:
        offline_if_unreachable()
    return name if folder is None else str(folder)


def _inside(folder: Path) -> str | None:
    """A hint at a model or an adapter one folder further down, as a run leaves them."""
    found = [file.parent for kind in ("", "adapter_") for file in sorted(folder.glob(f"*/{kind}config.json"))]
    return f"Did you mean {found[0]}?" if found else None


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
            f"model.name: the weights of {name} are damaged: {_first_line(error)}.",
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
    return UserError(f"model.name: {name} cannot be loaded: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _is_no_fault_of_the_model(error: Exception) -> bool:
    """Too little memory or disk: the command line has a sentence of its own for these."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or isinstance(error, torch.OutOfMemoryError)


_LOAD_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    ImportError,
    SafetensorError,
)


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, token: str | None = None
) -> Any:
    """The fast tokenizer of a model.

    Raises:
        UserError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    own = Path(name).expanduser()  # an adapter's folder may hold a tokenizer, and never a model
    where = str(own) if (own / "tokenizer_config.json").is_file() else _local_or_hub(name)
    try:
        return AutoTokenizer.from_pretrained(
            where, revision=revision, trust_remote_code=trust_remote_code, token=token
        )
    except Exception as error:  # the tokenizers library raises bare Exceptions
        if _is_no_fault_of_the_model(error):
            raise
        files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
        if Path(where).is_dir() and not any((Path(where) / file).is_file() for file in files):
            raise UserError(
                f"model.name: {name} has no tokenizer.", hint="Copy the base model's tokenizer files into it."
            ) from error
        if "tokenizer" in str(error) or isinstance(error, KeyError):
            raise UserError(
                f"model.name: the tokenizer of {name} cannot be read: {type(error).__name__} "
                f"{_first_line(error)}."
            ) from error
        raise _explain(name, error) from error


def _quantization(quantize: str, dtype: torch.dtype) -> dict[str, Any]:
    """Options of `from_pretrained` for a row of `ModelSettings.quantize`."""
    from transformers import BitsAndBytesConfig

    if quantize == "none":
        return {}
    if quantize == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": nf4}


def load_model(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantize: str = "none",
    revision: str | None = None,
    trust_remote_code: bool = False,
    token: str | None = None,
    attention: str | None = None,
    rope_scaling: Mapping[str, Any] | None = None,
) -> Any:
    """A causal model on `device`, its weights frozen, in `dtype` or (the linear layers) in 4 or 8 bits.

    Args:
        quantize: `none`, `nf4` for bitsandbytes' 4-bit NormalFloat with nested scales (QLoRA,
            https://arxiv.org/abs/2305.14314), or `int8` for its 8-bit integers (https://arxiv.org/abs/2208.07339).
        token: for the hub, in place of the login.
        attention: transformers' `attn_implementation`; None takes its default.
        rope_scaling: changes of the config's `rope_parameters`, such as `{"rope_type": "linear", "factor": 2.0}`.

    Raises:
        UserError: it does not exist, is gated, cannot be reached, is damaged or incomplete, or is no causal
            language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    where = _local_or_hub(name)
    source = {"revision": revision, "trust_remote_code": trust_remote_code, "token": token}
    try:
        options = _quantization(quantize, dtype)
        if attention is not None:
            options["attn_implementation"] = attention
        if rope_scaling:
            options["config"] = _stretched(AutoConfig.from_pretrained(where, **source), rope_scaling)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            where,
            dtype=dtype,
            device_map={"": str(device)},
            use_safetensors=True,
            output_loading_info=True,
            **source,
            **options,
        )
    except _LOAD_ERRORS as error:
        if _is_no_fault_of_the_model(error):
            raise
        raise _explain(name, error) from error
    model, report = loaded
    _refuse_missing(name, model, report["missing_keys"])
    _refuse_misread(name, model)
    _keep_scales_exact(model)
    model.requires_grad_(False)
    return model


def load_skeleton(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The model of `load_model` without weights, on the meta device: names, shapes and ties of its parameters.

    Raises:
        UserError: as `load_model`, as far as its config tells.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    where = _local_or_hub(name)
    try:
        config = AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except _LOAD_ERRORS as error:
        raise _explain(name, error) from error


class AdapterSource(NamedTuple):
    """Where an adapter lies, and the model that it was trained on."""

    folder: Path
    base: str
    revision: str | None


def find_adapter(name: str, *, revision: str | None = None, token: str | None = None) -> AdapterSource | None:
    """The adapter that `name` is; None where it is none.

    Args:
        name: a local folder, or an id on the hub, whose adapter is then fetched.

    Raises:
        UserError: its `adapter_config.json` names no base model.
    """
    from huggingface_hub import snapshot_download
    from transformers.utils.peft_utils import find_adapter_config_file

    local = Path(name).expanduser()
    if not local.is_dir():
        offline_if_unreachable()
    try:
        found = find_adapter_config_file(
            str(local) if local.is_dir() else name, revision=revision, token=token
        )
        if found is None:
            return None
        folder = Path(found).parent
        if not local.is_dir():
            folder = Path(
                snapshot_download(
                    name, revision=revision, token=token, ignore_patterns=["*.bin", "*.pt", "*.pth"]
                )
            )
    except _LOAD_ERRORS:
        return None  # the model's own loading says what is wrong, in a sentence
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if not base:
        raise UserError(
            f"model.name: the adapter in {folder} does not say which model it was trained on.",
            hint="Write the model into base_model_name_or_path of its adapter_config.json.",
        )
    return AdapterSource(folder, str(base), config.get("revision"))


def _stretched(config: Any, scaling: Mapping[str, Any]) -> Any:
    """A config whose rotary positions are scaled for rows longer than the model was made for."""
    text = config.get_text_config()
    own = getattr(text, "rope_parameters", None)
    if not own or "rope_theta" not in own:
        raise ValueError("its rotary positions cannot be scaled as a whole")
    scaling = {"rope_type" if name == "type" else name: value for name, value in scaling.items()}
    text.rope_parameters = {**own, **scaling}
    text.standardize_rope_params()  # notes the length that the model was made for where the scaling needs it
    if scaling.get("rope_type") in ("linear", "yarn"):
        text.max_position_embeddings = int(text.max_position_embeddings * float(scaling.get("factor", 1.0)))
    text.validate_rope()
    return config


def _refuse_missing(name: str, model: Any, missing: set[str]) -> None:
    """transformers fills parameters that the files lack with random numbers; nobody wants to train those."""
    if not missing:
        return
    built = type(model).__name__
    meant = ", ".join(model.config.architectures or ["unknown"])
    raise UserError(
        f"model.name: the weights of {name} lack {len(missing)} of the tensors of {built}, such as {min(missing)}.",
        hint="Fetch the model again; it is incomplete."
        if built in meant
        else f"Its config.json says {meant}: is it a causal language model?",
    )


def _refuse_misread(name: str, model: Any) -> None:
    """bitsandbytes' CPU code gives 4-bit weights the scales of other blocks where a block goes over the end of a row
    (0.50.2), and would compute with a model that nobody has."""
    for path, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and module.weight.device.type == "cpu" and state.shape[1] % state.blocksize:
            raise UserError(
                f"model.name: {name} cannot be held in 4 bits on a CPU: {path} has {state.shape[1]} columns, and "
                f"bitsandbytes computes wrongly there unless they are a multiple of {state.blocksize}.",
                hint="Load it without quantisation.",
            )


def _keep_scales_exact(model: Any) -> None:
    """On CPUs with bfloat16 units bitsandbytes repacks 4-bit weights at the first evaluation and rounds their
    scales to bfloat16 for good: training would go on with other weights than it began with. Switched off."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
