"""Which layers `all-linear` means: every linear layer but the head, and but what the table below leaves out.

Mixtures of experts are what it is for. Their routers choose among experts and are not adapted, as is usual; some are
subclasses of `nn.Linear` that return more than a product, on which an adapter cannot stand. Their experts are mostly
one tensor of three dimensions, which is no linear layer. Rejected: PEFT's own `all-linear`, which in some families
puts adapters on the experts and on the router, in others on neither, and stops at routers of a class of their own.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tunesmith.contracts.errors import UserError

ALL = "all-linear"

_HOW = "no adapter"
_BELOW_ADAPTER = re.compile(r"\.(base_layer|lora_\w+|modules_to_save|original_module)(\.|$)")
_NUMBER = re.compile(r"\.(\d+)\.")

_MODELLING = ("transformers.models.", "transformers_modules.")
"""Packages whose linear layers may compute anything; those of torch and of libraries that quantise are linear."""

_MAMBA_TYPES = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}
"""Types of models in which PEFT refuses every module that is called `out_proj`."""


class Place(NamedTuple):
    """A layer where it stands.

    Attributes:
        name: its whole name.
        module: itself.
        parent: the module that it is an attribute of.
        model_type: of the model's config.
    """

    name: str
    module: nn.Module
    parent: nn.Module
    model_type: str

    @property
    def last(self) -> str:
        """The last part of its name."""
        return self.name.rpartition(".")[2]


class Left(NamedTuple):
    """Why a layer gets no adapter.

    Attributes:
        finds: whether this is such a layer.
        what: what people call them; empty for the last parts of their names.
        why: the reason.
    """

    finds: Callable[[Place], bool]
    what: str
    why: str


def gives_a_product(module: nn.Module) -> bool:
    """Whether a layer turns `[…, K]` into `[…, N]`, as an adapter on it has to."""
    kind = type(module)
    if not isinstance(module, nn.Linear) or not kind.forward.__module__.startswith(_MODELLING):
        return True
    example = module.weight.new_ones(1, 2, module.in_features)
    try:
        with torch.no_grad():
            output: Any = module(example)
    except (IndexError, RuntimeError, TypeError, ValueError):  # it wants an input of another shape
        return False
    return isinstance(output, torch.Tensor) and output.shape == (1, 2, module.out_features)


@functools.cache
def taken_for_experts(model_type: str, name: str) -> bool:
    """Whether PEFT takes the last part of a name for experts which models of this type hold in one tensor.

    In these families it reads `down_proj` as the experts' parameter of that name wherever it stands, so that neither
    a dense layer nor a shared expert with that name can carry an adapter that loads again.
    """
    from peft import LoraConfig

    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # another PEFT, which takes names as they are
        return False
    config = LoraConfig(target_modules=[name])
    model: Any = SimpleNamespace(config=SimpleNamespace(model_type=model_type))
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # it wants the other half of a fused parameter as well
        return True
    return name not in (config.target_modules or ())


def _is_router(place: Place) -> bool:
    parts = place.name.split(".")
    return "router" in parts or "gate" in parts[-2:]


LEFT_OUT: tuple[Left, ...] = (
    Left(_is_router, "routers", "they choose among experts, and stay as they were trained"),
    Left(
        lambda place: not gives_a_product(place.module),
        "",
        "they compute more than a product, on which an adapter cannot stand",
    ),
    Left(
        lambda place: "indexer" in place.name.split("."),
        "indexers",
        "they pick the keys that are attended to, and no gradient reaches them",
    ),
    Left(
        lambda place: place.last == "dt_proj" and "Mamba" in type(place.parent).__name__,
        "",
        "their weight is read past an adapter",
    ),
    Left(
        lambda place: place.last == "out_proj" and place.model_type in _MAMBA_TYPES,
        "",
        "PEFT puts none there in models with Mamba layers",
    ),
    Left(
        lambda place: taken_for_experts(place.model_type, place.last),
        "",
        "PEFT takes them for the experts of the same name",
    ),
)
"""The first row that finds a layer says why it gets no adapter under `all-linear`."""

EXPERTS = ("experts", "one tensor holds all of a layer, and adapters are put on linear layers")
"""What is said of stacked experts, which are no linear layers."""


def ends_in(name: str, ending: str) -> bool:
    """Whether a module's name is `ending` or ends in it after a dot."""
    return name == ending or name.endswith(f".{ending}")


def stacked_experts(model: nn.Module) -> list[str]:
    """Names of the modules that hold several experts in one parameter, and carry no adapter."""
    return [
        name
        for name, module in model.named_modules()
        if "expert" in f"{name} {type(module).__name__}".lower()
        and not _BELOW_ADAPTER.search(name)
        and not hasattr(module, "lora_A")
        and any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))
    ]


def linear_layers(model: Any) -> dict[str, nn.Module]:
    """All linear layers but the head, by name; of a model with an adapter those that carry none."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and not _BELOW_ADAPTER.search(name)
    }


def left_out(model: Any) -> dict[str, Left]:
    """The linear layers that get no adapter under `all-linear`, each with the row that says why."""
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    found = {}
    for name, module in linear_layers(model).items():
        place = Place(name, module, model.get_submodule(name.rpartition(".")[0]), model_type)
        row = next((row for row in LEFT_OUT if row.finds(place)), None)
        if row is not None:
            found[name] = row
    return found


def all_linear(model: Any) -> set[str]:
    """Names of the layers that `all-linear` means.

    Raises:
        UserError: there are none.
    """
    kept = linear_layers(model).keys() - left_out(model).keys()
    if not kept:
        raise UserError(
            f"adapter.targets: {type(model).__name__} has no linear layer that an adapter can be put on.",
            hint="Train the weights themselves.",
        )
    return kept


def for_peft(model: Any, layers: Sequence[int] | int | None) -> str | list[str]:
    """`all-linear` in words that PEFT understands the same: the last parts of names where they tell layers apart.

    Args:
        layers: numbers of the decoder layers that get an adapter. Beside them PEFT wants names, and passes over them
            where it finds a whole name.
    """
    kept = all_linear(model)
    modules = {name for name, _ in model.named_modules()}
    if layers is None and kept == linear_layers(model).keys() and not stacked_experts(model):
        return ALL
    ends = {name.rpartition(".")[2] for name in kept}
    if not any(name.rpartition(".")[2] in ends for name in modules - kept):
        return sorted(ends)
    if layers is not None:
        wanted = {layers} if isinstance(layers, int) else set(layers)
        kept = {name for name in kept if (found := _NUMBER.search(name)) and int(found[1]) in wanted}
    return sorted(kept)


def left_out_rows(model: Any, targets: str | Sequence[str]) -> list[tuple[str, str, str]]:
    """Rows (what, how, why) for people of what targets name and an adapter is not on.

    Args:
        model: without the adapter or with it.
    """
    every = targets == ALL
    ends: dict[Left, set[str]] = {}
    for name, row in left_out(model).items():
        named = not isinstance(targets, str) and any(ends_in(name, target) for target in targets)
        if every or named:
            ends.setdefault(row, set()).add(name.rpartition(".")[2])
    rows = [(row.what or ", ".join(sorted(ends[row])), _HOW, row.why) for row in LEFT_OUT if row in ends]
    return [(EXPERTS[0], _HOW, EXPERTS[1]), *rows] if every and stacked_experts(model) else rows
