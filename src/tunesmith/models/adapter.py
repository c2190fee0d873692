"""What is trained: a PEFT LoRA adapter on a frozen model, or the model itself.

Parameters that are trained are float32 whatever the frozen weights are held in: a step of 1e-5 of a weight's size
is below what bfloat16 can add. Full fine-tuning may hold them in bfloat16 where the optimizer rounds stochastically.
"""

from __future__ import annotations

import fnmatch
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tunesmith.contracts.errors import UserError
from tunesmith.models.adapter_checks import (
    check_dora,
    check_excluded,
    check_layers,
    check_patterns,
    check_rows,
    check_saved,
    check_start,
    check_targets,
)
from tunesmith.models.adapter_targets import ALL, ends_in, for_peft
from tunesmith.models.loftq import start_from_rounding
from tunesmith.models.vocabulary import embedding_name, widen_for


def add_lora(
    model: Any,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: str | Sequence[str],
    seed: int,
    init_lora_weights: bool | str = True,
    modules_to_save: Sequence[str] = (),
    layers_to_transform: Sequence[int] | int | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    **options: Any,
) -> Any:
    """Freeze `model` and put a fresh LoRA adapter on it; unless told otherwise, the first loss is the model's own.

    Args:
        targets: `all-linear` (every linear layer but the head and what `adapter_targets` leaves out), name endings,
            or a regular expression that a layer's whole name matches.
        init_lora_weights: True (B is zero), `gaussian`, `pissa`, `olora`, or `loftq`, which makes up for what a 4-bit
            base lost by rounding.
        modules_to_save: name endings of modules that train whole beside the adapter: `embed_tokens`, `lm_head`.
        layers_to_transform: numbers of the decoder layers that get an adapter.
        rank_pattern: rank of the layers whose name ends in a key or matches it as a regular expression.
        alpha_pattern: the same for alpha.
        options: further fields of PEFT's `LoraConfig`, as they are.

    Returns:
        A `peft.PeftModel` whose trained parameters are float32.

    Raises:
        UserError: what an option names is not there, or the base is not what the option needs.
    """
    from peft import LoraConfig, get_peft_model

    targeted = check_targets(model, targets)
    check_excluded(options.get("exclude_modules"), targeted)
    check_patterns("adapter.rank_pattern", rank_pattern or (), targeted)
    check_patterns("adapter.alpha_pattern", alpha_pattern or (), targeted)
    check_rows(model, options.get("trainable_token_indices"))
    check_start(model, init_lora_weights)
    check_layers(model, layers_to_transform, targets)
    check_saved(model, modules_to_save)
    if options.get("use_dora"):
        check_dora(model)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT divides it; a float is fine
        lora_dropout=dropout,
        target_modules=_targets(model, targets, layers_to_transform),
        # LoftQ starts from the 4-bit weights as they are: PEFT's own start would round the base once more
        init_lora_weights=True if init_lora_weights == "loftq" else init_lora_weights,  # type: ignore[arg-type]
        modules_to_save=list(modules_to_save) or None,
        layers_to_transform=_plain(layers_to_transform),
        rank_pattern=dict(rank_pattern or {}),
        alpha_pattern=dict(alpha_pattern or {}),
        task_type="CAUSAL_LM",
        # the head of a model with tied embeddings is its embeddings: trained apart they would be two
        ensure_weight_tying=bool(modules_to_save) and _is_tied(model),
        **options,
    )
    try:
        with _renamed():
            adapted = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"adapter: PEFT cannot put this adapter on the model: {error}") from error
    if init_lora_weights == "loftq":
        start_from_rounding(adapted)
    return _in_float32(adapted)


def _targets(model: Any, targets: str | Sequence[str], layers: Any) -> str | list[str]:
    """Targets as PEFT takes them."""
    if targets == ALL:
        return for_peft(model, layers)
    return targets if isinstance(targets, str) else list(targets)


def _plain(layers: Sequence[int] | int | None) -> list[int] | int | None:
    return list(layers) if isinstance(layers, Sequence) else layers


def _is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


@contextmanager
def _renamed() -> Iterator[None]:
    """PEFT asks transformers by a name that is on its way out, and a person who reads that can mend nothing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*checkpointing.* is deprecated", category=FutureWarning)
        yield


def _show_bias(model: Any) -> None:
    """Have embeddings or a head of which some rows train show the bias of what they stand for.

    PEFT's wrapper shows the weight alone, and who computes the head without calling it (TRL does) asks for both.
    """
    for module in model.modules():
        if type(module).__name__ == "TrainableTokensWrapper":
            # not as a parameter, which would stand in the state dict twice
            object.__setattr__(module, "bias", getattr(module.original_module, "bias", None))


def _in_float32(model: Any) -> Any:
    """What trains in float32; PEFT widens the adapter alone, not what trains whole beside it.

    Trained embeddings give hidden states of their own type, and a trained head takes none but its own: both are
    brought together with the type of the frozen layers, which without autocast would not compute. Where rows of them
    train alone, PEFT puts these into the frozen matrix in the type of that.
    """
    _show_bias(model)
    base = model.get_base_model()
    compute = next(
        (p.dtype for p in base.parameters() if not p.requires_grad and p.is_floating_point()), None
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    if compute is None or compute == torch.float32:
        return model
    if any(parameter.requires_grad for parameter in embeddings.parameters()):
        embeddings.register_forward_hook(lambda _, __, output: output.to(compute))
    if hasattr(head, "token_adapter"):
        return model
    if head is not None and any(parameter.requires_grad for parameter in head.parameters()):
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))
    return model


def load_lora(model: Any, path: str, *, assign: bool = False) -> Any:
    """Freeze `model` and continue training the adapter saved in `path`.

    Args:
        assign: put the saved tensors in the places of the model's own, and copy nothing into those.

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
        widen_for(model, _rows_in(folder, embedding_name(model)))
        with _renamed():
            loaded = PeftModel.from_pretrained(
                model, str(folder), is_trainable=True, low_cpu_mem_usage=assign
            )
    except SafetensorError as error:
        raise UserError(
            f"adapter.path: the weights of the adapter in {folder} are damaged: {error}."
        ) from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(
            f"adapter.path: {folder / 'adapter_config.json'} is not an adapter's: {error}."
        ) from error
    except torch.OutOfMemoryError:  # no fault of the adapter
        raise
    except (RuntimeError, ValueError) as error:
        lines = [line.strip() for line in str(error).strip().splitlines()]
        reason = lines[1] if len(lines) > 1 and lines[0].endswith(":") else lines[0]
        raise UserError(f"adapter.path: the adapter in {folder} does not fit the model: {reason}") from error
    kind = loaded.peft_config["default"].peft_type
    if kind != PeftType.LORA:
        raise UserError(f"adapter.path: the adapter in {folder} is {kind}, and only LoRA can be continued.")
    _check_complete(loaded, folder)
    rounded = any(p.requires_grad and p.dtype != torch.float32 for p in loaded.parameters())
    loaded = _in_float32(loaded)
    if rounded and not assign:
        _read_again(loaded, folder)
    return loaded


def _read_again(model: Any, folder: Path) -> None:
    """Give what trains beside the adapter's matrices its values in float32.

    PEFT has copied them from the file into copies of the base's modules, and so rounded them to the type of those.
    """
    from peft import load_peft_weights, set_peft_model_state_dict

    weights = load_peft_weights(str(folder), device="cpu")
    set_peft_model_state_dict(model, {name: value for name, value in weights.items() if ".lora_" not in name})


def _rows_in(folder: Path, embeddings: str) -> int:
    """Rows that the embeddings need for an adapter: those of its files, and those of the tokens that it trained."""
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        names = [name for name in file.keys() if ends_in(name, f"{embeddings}.weight")]  # noqa: SIM118
        rows: list[int] = [file.get_slice(name).get_shape()[0] for name in names]
    trained = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get(
        "trainable_token_indices"
    )
    for indices in trained.values() if isinstance(trained, dict) else [trained or ()]:
        rows += [int(index) + 1 for index in indices]
    return max(rows, default=0)


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


def train_all(
    model: Any,
    frozen: Sequence[str],
    frozen_dtype: torch.dtype = torch.float32,
    trained_dtype: torch.dtype = torch.float32,
) -> Any:
    """Make every parameter of `model` trainable, but for those that match a glob pattern.

    Args:
        model: loaded in `trained_dtype`, so that training starts from the checkpoint's own values.
        frozen: glob patterns of parameter names.
        frozen_dtype: type in which what does not train is held.
        trained_dtype: type in which the rest is; bfloat16 needs an optimizer that rounds stochastically.

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
        parameter.data = parameter.data.to(trained_dtype if trained else frozen_dtype)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("model.freeze leaves no parameter to train.")
    return model
