"""What is trained: a PEFT LoRA adapter on a frozen model, or the model itself.

Parameters that are trained are float32 whatever the frozen weights are held in: a step of 1e-5 of a weight's size
is below what bfloat16 can add.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from tunesmith.contracts.errors import UserError


def _head(model: Any) -> Any:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _linear_names(model: nn.Module) -> list[str]:
    """The last parts of the names of all linear layers, such as `q_proj`, without the head."""
    head = _head(model)
    names = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    return sorted(names)


def _check_targets(model: nn.Module, targets: Sequence[str]) -> None:
    modules = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in modules):
            known = _linear_names(model)
            near = difflib.get_close_matches(target, known, n=1)
            raise UserError(
                f"adapter.targets: no linear layer of {type(model).__name__} is called {target!r}.",
                hint=f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(known)}.",
            )
    head = _head(model)
    for name, module in model.named_modules():
        if module is head and any(name == t or name.endswith(f".{t}") for t in targets):
            raise UserError(
                f"adapter.targets: {name} is the language-model head, which an adapter cannot be put on.",
                hint="Leave it out of the list.",
            )


def add_lora(
    model: Any, *, rank: int, alpha: float, dropout: float, targets: str | Sequence[str], seed: int
) -> Any:
    """Freeze `model` and put a fresh LoRA adapter on it; B starts at zero, so the first loss is the model's own.

    Args:
        targets: `all-linear` (every linear layer but the head) or name endings.

    Returns:
        A `peft.PeftModel` whose adapter is in float32 and trainable.

    Raises:
        UserError: a target names no linear layer.
    """
    from peft import LoraConfig, get_peft_model

    if not isinstance(targets, str):
        _check_targets(model, targets)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT divides it; a float is fine
        lora_dropout=dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def load_lora(model: Any, path: str) -> Any:
    """Freeze `model` and continue training the adapter saved in `path`.

    Raises:
        UserError: the folder holds no LoRA adapter in safetensors, or it does not fit the model.
    """
    from peft import PeftModel, PeftType

    folder = Path(path).expanduser()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(
                f"adapter.path: {folder} holds no {name}.",
                hint="Give the folder of an adapter saved by PEFT as safetensors.",
            )
    try:
        loaded = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    except SafetensorError as error:
        raise UserError(
            f"adapter.path: the weights of the adapter in {folder} are damaged: {error}."
        ) from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(
            f"adapter.path: {folder / 'adapter_config.json'} is not an adapter's: {error}."
        ) from error
    except (RuntimeError, ValueError) as error:
        lines = [line.strip() for line in str(error).strip().splitlines()]
        reason = lines[1] if len(lines) > 1 and lines[0].endswith(":") else lines[0]
        raise UserError(f"adapter.path: the adapter in {folder} does not fit the model: {reason}") from error
    kind = loaded.peft_config["default"].peft_type
    if kind != PeftType.LORA:
        raise UserError(f"adapter.path: the adapter in {folder} is {kind}, and only LoRA can be continued.")
    _check_complete(loaded, folder)
    for (
        parameter
    ) in loaded.parameters():  # PEFT widens the adapter alone, not what `modules_to_save` trains beside it
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return loaded


def _check_complete(model: Any, folder: Path) -> None:
    """PEFT passes over tensors that have no place in the model, and starts those that are not there anew."""
    from peft import get_peft_model_state_dict

    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        found = set(file.keys())
    missing, surplus = expected - found, {name for name in found - expected if ".lora_" in name}
    if missing or surplus:
        what = f"it lacks {min(missing)}" if missing else f"the model has no place for {min(surplus)}"
        raise UserError(
            f"adapter.path: the adapter in {folder} does not fit the model: {what}.",
            hint="Set model.name to the model that it was trained on.",
        )


def train_all(model: Any, frozen: Sequence[str], frozen_dtype: torch.dtype = torch.float32) -> Any:
    """Make every parameter of `model` trainable in float32, but for those that match a glob pattern.

    Args:
        model: loaded in float32, so that training starts from the checkpoint's own values.
        frozen: glob patterns of parameter names.
        frozen_dtype: type in which what does not train is held.

    Raises:
        UserError: a pattern matches no parameter, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in frozen:
        if not fnmatch.filter(names, pattern):
            raise UserError(
                f"model.freeze: the pattern {pattern!r} matches no parameter.",
                hint=f"Parameters are named like {names[0]!r} and {names[-1]!r}.",
            )
    for name, parameter in model.named_parameters():
        trained = not any(fnmatch.fnmatchcase(name, pattern) for pattern in frozen)
        parameter.requires_grad_(trained)
        parameter.data = parameter.data.to(torch.float32 if trained else frozen_dtype)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("model.freeze leaves no parameter to train.")
    return model
