"""Rows of `tunesmith doctor` about what a run would use here, and why: device, types, attention, fused layers.

They ask the functions that a run asks. What only a loaded model tells is said to be decided when the run starts,
and is not guessed here.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.config.doctor_row import Check, Finding, Subject
from tunesmith.contracts.errors import ConfigError, UserError
from tunesmith.contracts.plural import counted
from tunesmith.data.cache import cache_folder
from tunesmith.settings.run import RunSettings

if TYPE_CHECKING:
    import torch

_TOKENS = 256
"""Length of the two documents that attention backends are asked about: any that trains is longer."""


def _run_file(subject: Subject) -> Finding | None:
    if subject.run_file is None:
        return None
    try:
        settings = subject.settings
    except ConfigError as error:
        problems = "; ".join(map(str, error.problems))
        return Finding(
            f"{counted(len(error.problems), 'problem')}: {problems}", "broken", "Mend the run file."
        )
    except UserError as error:
        return Finding(error.message, "broken", error.hint or "")
    assert settings is not None, "a run is named"
    return Finding(f"{subject.run_file} is right")


def _usable_settings(subject: Subject) -> RunSettings | None:
    """The settings of the run; None without a run, and where the row of the run file already says what is wrong."""
    try:
        return subject.settings
    except UserError:
        return None


# ---------------------------------------------------------------- model and data


def _model(subject: Subject) -> Finding | None:
    settings = _usable_settings(subject)
    if settings is None:
        return None
    name = settings.model.name
    try:
        config = subject.config
    except UserError as error:
        return Finding(error.message, "broken", error.hint or "")
    if config is None:
        return Finding(
            f"{name} is not on this machine", "note", "The hub is asked for it when the run starts."
        )
    return Finding(f"{name}, {config.model_type}")


def _data(subject: Subject) -> Finding | None:
    from tunesmith.data.sources import open_source

    settings = _usable_settings(subject)
    if settings is None:
        return None
    held = settings.data.eval if isinstance(settings.data.eval, tuple) else ()
    sources = [*settings.data.train, *held]
    try:
        for source in sources:
            open_source(source.path, split=source.split, name=source.name, revision=source.revision)
    except UserError as error:
        return Finding(error.message, "broken", error.hint or "")
    check = f"`tunesmith data check {subject.run_file}` says what it would train on."
    return Finding(f"{counted(len(sources), 'source')} found", advice=check)


# ---------------------------------------------------------------- device and types


def _device(subject: Subject) -> Finding:
    import torch

    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(0)
        name = torch.cuda.get_device_name(0)
        return Finding(f"cuda:0, {name}, compute capability {major}.{minor}, CUDA {torch.version.cuda}")
    if not subject.cards:
        return Finding("cpu: there is no NVIDIA GPU")
    if torch.version.cuda is None:
        advice = "Install the build of torch for CUDA: `pip install --force-reinstall torch`."
        return Finding(
            f"cpu: there is a GPU, and torch {torch.__version__} was built without CUDA", "note", advice
        )
    advice = f"torch needs a driver for CUDA {torch.version.cuda}; look at CUDA_VISIBLE_DEVICES, too."
    return Finding("cpu: there is a GPU, and torch cannot use it", "note", advice)


def _dtype(subject: Subject) -> Finding:
    settings = _usable_settings(subject)
    setting = settings.model.dtype if settings is not None else "auto"
    device, dtype = _device_and_dtype(subject)
    name = str(dtype).removeprefix("torch.")
    if setting != "auto":
        return Finding(f"{name}: model.dtype says so")
    if device.type == "cpu":
        return Finding(f"{name}: 16 bits are slower on most CPUs")
    return Finding(f"{name}: {'this GPU computes it' if name == 'bfloat16' else 'this GPU has no bfloat16'}")


def _device_and_dtype(subject: Subject) -> tuple[torch.device, torch.dtype]:
    from tunesmith.models.loader import choose_device, choose_dtype

    settings = _usable_settings(subject)
    device = choose_device()
    return device, choose_dtype(settings.model.dtype if settings is not None else "auto", device)


# ---------------------------------------------------------------- layers


def _attention(subject: Subject) -> Finding:
    from tunesmith.models.attention import choose_attention

    settings = _usable_settings(subject)
    device, dtype = _device_and_dtype(subject)
    try:
        stock = choose_attention(settings.model.attention if settings is not None else "auto", device, dtype)
    except UserError as error:
        return Finding(error.message, "broken", error.hint or "")
    if device.type == "cpu":
        return Finding(f"{stock}: one exact call for each document; all others need a GPU")
    fused = fused_backend(device, dtype, subject.config if settings is not None else None)
    return Finding(f"{fused} in fused layers, {stock} in stock ones")


def fused_backend(device: torch.device, dtype: torch.dtype, config: Any = None) -> str:
    """The row of `BACKENDS` that computes attention in fused layers of a model, without a config of Llama's heads."""
    import torch

    from tunesmith.kernels.attention import Documents, Heads, choose_backend
    from tunesmith.models.read_layer import heads_of

    heads = heads_of(config) if config is not None else Heads(32, 8, 128)
    starts = torch.tensor([0, _TOKENS, 2 * _TOKENS], dtype=torch.int32, device=device)
    fused_TN = torch.empty(2 * _TOKENS, heads.columns, device=device, dtype=dtype)
    return choose_backend(fused_TN, heads, Documents((_TOKENS, _TOKENS), starts))


def _layers(subject: Subject) -> Finding:
    from tunesmith.kernels.launch import HAS_TRITON
    from tunesmith.planning.architectures import find_architecture

    device, _ = _device_and_dtype(subject)
    if device.type == "cpu":
        return Finding("stock layers: on a CPU fused ones are not faster")
    if not HAS_TRITON:
        advice = "Install it: `pip install triton`."
        return Finding("fused layers in their torch forms: triton is missing", "note", advice)
    settings = _usable_settings(subject)
    config = subject.config if settings is not None else None
    if config is None:
        return Finding(
            "fused, for the families in docs/families.md", advice="Name a run file to see for its model."
        )
    row, reason = find_architecture(config)
    return (
        Finding(f"fused, as {row.models}") if row is not None else Finding(f"stock layers: {reason}", "note")
    )


def _kernels(subject: Subject) -> Finding:
    device, _ = _device_and_dtype(subject)
    if device.type == "cpu":
        return Finding("not used: on a CPU their torch references compute")
    return remembered_canary(cache_folder("canary"))


def remembered_canary(folder: Path) -> Finding:
    """What the newest check of the kernels on this machine found."""
    outcomes = sorted(folder.glob("*.json"), key=lambda file: file.stat().st_mtime)
    if not outcomes:
        return Finding("not checked yet", advice="The first run on this GPU checks them, in a few seconds.")
    failed = [entry["name"] for entry in json.loads(outcomes[-1].read_text(encoding="utf-8"))]
    day = time.strftime("%Y-%m-%d", time.localtime(outcomes[-1].stat().st_mtime))
    if failed:
        value = f"{', '.join(failed)} failed the check of {day}"
        return Finding(value, "note", "Their torch references compute, which is right and slower.")
    return Finding(f"all passed the check of {day}")


def _graphs(subject: Subject) -> Finding:
    from tunesmith.planning.graphs import graphs_refusal

    device, dtype = _device_and_dtype(subject)
    settings = _usable_settings(subject)
    train = settings.train if settings is not None else None
    reason = graphs_refusal(
        train.cuda_graphs if train is not None else "auto",
        gpu=device.type != "cpu",
        loss_scale=str(dtype) == "torch.float16",
        neftune=train is not None and train.neftune_alpha is not None,
        deterministic=train is not None and train.deterministic,
    )
    if reason is not None:
        return Finding(f"none: {reason}")
    return Finding("where the model is too small to keep the GPU busy; decided when the run starts")


def _quantised(subject: Subject) -> Finding | None:
    from importlib.util import find_spec

    settings = _usable_settings(subject)
    if settings is None or settings.model.quantize == "none":
        return None
    if find_spec("bitsandbytes") is None:
        value = f"{settings.model.quantize} needs bitsandbytes, which is not installed"
        return Finding(value, "broken", "Run `pip install bitsandbytes`, or set model.quantize: none.")
    return Finding(f"{settings.model.quantize}, by bitsandbytes")


PLAN: tuple[Check, ...] = (
    Check("a run here", "run file", _run_file),
    Check("a run here", "model", _model),
    Check("a run here", "data", _data),
    Check("a run here", "device", _device),
    Check("a run here", "compute type", _dtype),
    Check("a run here", "weights", _quantised),
    Check("a run here", "attention", _attention),
    Check("a run here", "layers", _layers),
    Check("a run here", "kernels", _kernels),
    Check("a run here", "CUDA graphs", _graphs),
)
