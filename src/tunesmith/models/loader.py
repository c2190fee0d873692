"""Loads a causal model and its tokenizer through transformers, and says in one sentence why it could not.

Weights are read from safetensors only, never from a pickle.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tunesmith.contracts.errors import UserError, first_line
from tunesmith.contracts.hub import offline_if_unreachable
from tunesmith.contracts.model_folder import local_folder
from tunesmith.models.load_errors import LOAD_ERRORS, explain, is_no_fault_of_the_model
from tunesmith.models.loading_progress import Tell, loading_progress
from tunesmith.models.rope_scaling import rotate_by_document, stretch

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


def _local_or_hub(name: str) -> str:
    """The folder or hub id to load from; what looks like a path but is none is refused before the hub is asked.

    Raises:
        UserError: there is no such folder, or it holds no model.
    """
    folder = local_folder(name)
    if folder is None:
        offline_if_unreachable()
    return name if folder is None else str(folder)


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
        if is_no_fault_of_the_model(error):
            raise
        files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
        if Path(where).is_dir() and not any((Path(where) / file).is_file() for file in files):
            raise UserError(
                f"model.name: {name} has no tokenizer.", hint="Copy the base model's tokenizer files into it."
            ) from error
        if "tokenizer" in str(error) or isinstance(error, KeyError):
            raise UserError(
                f"model.name: the tokenizer of {name} cannot be read: {type(error).__name__} "
                f"{first_line(error)}."
            ) from error
        raise explain(name, error) from error


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


def _refuse_other_bits(name: str, model: Any, quantize: str) -> None:
    """transformers leaves a checkpoint as it is quantised, whatever is asked for."""
    held = getattr(model.config, "quantization_config", None)
    bits = next((bits for bits in (4, 8) if getattr(held, f"load_in_{bits}bit", False)), None)
    asked = {"nf4": 4, "int8": 8}.get(quantize)
    if bits is not None and asked not in (None, bits):
        raise UserError(
            f"model.quantize: {quantize}: {name} is quantised to {bits} bits already, and stays so.",
            hint="Leave it out, or name the checkpoint in 16 bits.",
        )


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
    tell: Tell | None = None,
) -> Any:
    """A causal model on `device`, its weights frozen, in `dtype` or (the linear layers) in 4 or 8 bits.

    Weights that are quantised on the way are read, moved and rounded one at a time, so one of them in full precision
    is on the device beside what stays there. transformers does that; `test_loader_memory` holds it to it.

    Args:
        quantize: `none`, `nf4` for bitsandbytes' 4-bit NormalFloat with nested scales (QLoRA,
            https://arxiv.org/abs/2305.14314), or `int8` for its 8-bit integers (https://arxiv.org/abs/2208.07339).
        token: for the hub, in place of the login.
        attention: transformers' `attn_implementation`; None takes its default.
        rope_scaling: how rotary positions are stretched, such as `{"rope_type": "linear", "factor": 2.0}`.
        tell: gets a line about the weights that are loaded, again and again.

    Raises:
        UserError: it does not exist, is gated, cannot be reached, is damaged or incomplete, is no causal language
            model, or has no positions that can be stretched so.
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
        with loading_progress(tell), warnings.catch_warnings():
            # a checkpoint in 4 bits may be asked for in 4 bits; in others it is refused below
            warnings.filterwarnings(
                "ignore", message="You passed `quantization_config`", category=UserWarning
            )
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                where,
                dtype=dtype,
                device_map={"": str(device)},
                use_safetensors=True,
                output_loading_info=True,
                **source,
                **options,
            )
    except LOAD_ERRORS as error:
        if is_no_fault_of_the_model(error):
            raise
        raise explain(name, error) from error
    model, report = loaded
    _refuse_missing(name, model, report["missing_keys"])
    _refuse_misread(name, model)
    _refuse_other_bits(name, model, quantize)
    _keep_scales_exact(model)
    rotate_by_document(model)
    model.requires_grad_(False)
    return model


def _stretched(config: Any, scaling: Mapping[str, Any]) -> Any:
    """The config with a scaling of its positions, which scripts may call by transformers' older word `type`."""
    said = {name: value for name, value in scaling.items() if value is not None}
    stretch(config, {"rope_type" if name == "type" else name: value for name, value in said.items()})
    return config


def load_skeleton(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    rope_scaling: Mapping[str, Any] | None = None,
) -> Any:
    """The model of `load_model` without weights, on the meta device: names, shapes and ties of its parameters.

    Raises:
        UserError: as `load_model`, as far as its config tells.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    where = _local_or_hub(name)
    try:
        config = AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=trust_remote_code)
        if rope_scaling:
            _stretched(config, rope_scaling)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except LOAD_ERRORS as error:
        raise explain(name, error) from error


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
    except LOAD_ERRORS:
        return None  # the model's own loading says what is wrong, in a sentence
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if not base:
        raise UserError(
            f"model.name: the adapter in {folder} does not say which model it was trained on.",
            hint="Write the model into base_model_name_or_path of its adapter_config.json.",
        )
    return AdapterSource(folder, str(base), config.get("revision"))


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
