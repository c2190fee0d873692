"""`from_pretrained`: a model of transformers, held and placed as a script asks for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tunesmith.api.arguments import LOADING, check_foreign
from tunesmith.api.facts import Facts, remember
from tunesmith.api.memory import policies_of
from tunesmith.api.prepared import equip, note_length, put_on
from tunesmith.api.silence import without_bars
from tunesmith.api.values import LOADED, check_rope, check_source, check_values
from tunesmith.api.wording import in_arguments
from tunesmith.config.find_result import scaling_of_run
from tunesmith.contracts.errors import UserError
from tunesmith.data.cache import cache_folder
from tunesmith.models.adapter import load_lora, train_all
from tunesmith.models.gguf import convert_gguf
from tunesmith.models.loader import choose_device, choose_dtype, find_adapter, load_model, load_tokenizer

_ONE_DEVICE = (None, "auto", "sequential")


def from_pretrained(
    model_name: str,
    max_seq_length: int = 2048,
    dtype: torch.dtype | str | None = None,
    load_in_4bit: bool | None = None,
    load_in_8bit: bool = False,
    load_in_16bit: bool = False,
    full_finetuning: bool = False,
    token: str | None = None,
    device_map: Any = None,
    rope_scaling: Mapping[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    use_gradient_checkpointing: bool | str = "unsloth",
    quiet: bool = False,
    **foreign: Any,
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        model_name: an id on the Hugging Face hub, a folder, a GGUF file, or an adapter (id or folder), which is
            loaded on its base and trains on.
        max_seq_length: longest row in tokens; `SFTTrainer` cuts there.
        dtype: compute type; None takes bfloat16 where the GPU has it, float16 on older ones, float32 on a CPU. With
            `full_finetuning`, bfloat16 is also what the weights train in.
        load_in_4bit: hold linear layers in NF4; None does so unless one of the next three is True.
        load_in_8bit: hold them in 8-bit integers. Not fused.
        load_in_16bit: hold all weights in `dtype`.
        full_finetuning: train the weights themselves, in float32 unless `dtype` is given as bfloat16.
        token: for the hub, in place of the login.
        device_map: the device; one device trains, by default the first GPU, else the CPU.
        rope_scaling: `{"rope_type": "linear", "factor": 2.0}` and the like, for rows that are longer than the model
            was made for; by default that of the run which left an adapter.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run Python code that the model's repository ships.
        attn_implementation: attention of transformers where batches are not packed.
        use_gradient_checkpointing: for an adapter or full fine-tuning; else `get_peft_model` is told.
        quiet: print nothing, here and later on.
        foreign: arguments of Unsloth that change nothing here, or are refused with their reason.

    Returns:
        A model of transformers (a `PeftModel` for an adapter), and its tokenizer.

    Raises:
        UserError: it cannot be loaded, or not so.
        TypeError: an argument that nobody knows.
    """
    check_foreign(from_pretrained, LOADING, foreign)
    given = {"model_name": model_name, "max_seq_length": max_seq_length, "rope_scaling": rope_scaling}
    check_values("from_pretrained", LOADED, given)
    check_source(str(model_name), revision)
    check_rope(rope_scaling)
    policies_of(use_gradient_checkpointing)
    held = _held(load_in_4bit, load_in_8bit, load_in_16bit, full_finetuning)
    device = _device(device_map)
    compute = choose_dtype(_dtype_name(dtype), device)
    trained = _trained_dtype(dtype, foreign)
    facts = Facts(str(model_name), full_finetuning, use_gradient_checkpointing, quiet)
    name = _unpacked(str(model_name))
    options = {"attention": attn_implementation, "rope_scaling": rope_scaling}
    with in_arguments(), without_bars(quiet):
        model, tokenizer, adapted = _load(
            name,
            revision,
            held,
            device,
            trained if held == "full" else compute,
            options,
            {"trust_remote_code": trust_remote_code, "token": token},
        )
    remember(model, facts)
    equip(model, max_seq_length)
    facts.stretched = bool(rope_scaling)
    note_length(facts, model)
    if adapted or full_finetuning:
        put_on(model, facts, use_gradient_checkpointing)
    return model, tokenizer


def _load(
    name: str,
    revision: str | None,
    held: str,
    device: torch.device,
    dtype: torch.dtype,
    options: dict[str, Any],
    access: dict[str, Any],
) -> tuple[Any, Any, bool]:
    """Model, tokenizer, and whether the name was an adapter's.

    Args:
        dtype: of the weights that are not quantised.
        options: of `load_model`.
        access: how the hub is reached and trusted.
    """
    adapter = find_adapter(name, revision=revision, token=access["token"])
    base, base_revision = (name, revision) if adapter is None else (adapter.base, adapter.revision)
    if adapter is not None and not options["rope_scaling"]:
        options = options | {"rope_scaling": scaling_of_run(adapter.folder)}
    if adapter is not None and held == "full":
        raise UserError(
            f"model_name: {name} is an adapter, whose base stays frozen.", hint="Leave out full_finetuning."
        )
    try:
        model = load_model(
            base,
            device=device,
            dtype=dtype,
            quantize="none" if held == "full" else held,
            revision=base_revision,
            **options,
            **access,
        )
    except UserError as error:
        if adapter is None:
            raise
        raise UserError(
            f"{error.message} It is the base of the adapter {name}.",
            hint=error.hint,
            exit_code=error.exit_code,
        ) from error.__cause__
    if adapter is None:
        tokenizer = load_tokenizer(base, revision=base_revision, **access)
    else:
        model = load_lora(model, str(adapter.folder))
        own = (adapter.folder / "tokenizer_config.json").is_file()
        tokenizer = load_tokenizer(
            str(adapter.folder) if own else base, revision=None if own else base_revision, **access
        )
    if held == "full":
        _refuse_quantized(model, name)
        model = train_all(model, (), trained_dtype=dtype)
    return model, tokenizer, adapter is not None


def _held(four: bool | None, eight: bool, sixteen: bool, full: bool) -> str:
    """How weights are held: `nf4`, `int8`, `none`, or `full` where they are trained."""
    asked = {"load_in_4bit": four, "load_in_8bit": eight, "load_in_16bit": sixteen, "full_finetuning": full}
    chosen = [name for name, value in asked.items() if value]
    if len(chosen) > 1:
        raise UserError(
            f"{chosen[0]} and {chosen[1]} cannot both be True: they say how the weights are held.",
            hint="Leave one of them out.",
        )
    forms = {
        "load_in_4bit": "nf4",
        "load_in_8bit": "int8",
        "load_in_16bit": "none",
        "full_finetuning": "full",
    }
    return forms[chosen[0]] if chosen else ("none" if four is False else "nf4")


def _dtype_name(dtype: torch.dtype | str | None) -> str:
    name = "auto" if dtype is None else str(dtype).removeprefix("torch.")
    if name not in ("auto", "float32", "bfloat16", "float16"):
        raise UserError(
            f"dtype={dtype!r} is no compute type.",
            hint="Use None, torch.bfloat16, torch.float16 or torch.float32.",
        )
    return name


def _trained_dtype(dtype: torch.dtype | str | None, foreign: Mapping[str, Any]) -> torch.dtype:
    """Type in which weights train that are trained themselves."""
    if _dtype_name(dtype) != "bfloat16":
        return torch.float32  # float16 has no room for the updates, nor for gradients without a loss scale
    return torch.float32 if foreign.get("float32_mixed_precision") else torch.bfloat16


def _device(device_map: Any) -> torch.device:
    """The one device that a `device_map` asks for."""
    if device_map in _ONE_DEVICE:
        return choose_device()
    if isinstance(device_map, Mapping) and len(set(map(str, device_map.values()))) == 1:
        device_map = next(iter(device_map.values()))
    try:
        if isinstance(device_map, int):
            device = torch.device("cuda", device_map)
        elif isinstance(device_map, str | torch.device):
            device = torch.device(device_map)
        else:
            raise TypeError
    except (RuntimeError, TypeError):
        raise UserError(
            f"device_map={device_map!r} does not name one device, and a model trains on one.",
            hint='Leave it out, or name a device such as "cuda:0" or "cpu".',
        ) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device_map={device_map!r}: there is no CUDA device here.", hint="Leave it out.")
    return device


def _unpacked(name: str) -> str:
    """A GGUF file as a folder of safetensors, converted once; a folder by its whole path, which an adapter's file
    then names from wherever it is read; any other name as it is."""
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path.resolve())
    if path.suffix != ".gguf" or not path.is_file():
        return name
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache_folder("gguf") / f"{path.stem}-{key}"
    return str(convert_gguf(path.resolve(), folder))


def _refuse_quantized(model: Any, name: str) -> None:
    if getattr(model, "is_quantized", False):
        raise UserError(
            f"model_name: the weights of {name} are quantised, and cannot be trained themselves.",
            hint="Give the model in 16 bits, or leave out full_finetuning and train an adapter.",
        )
