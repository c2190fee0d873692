"""What a decoder layer of a family is: where its projections and norms stand, and what is constant in it."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

from torch import nn
from transformers.activations import ACT2FN

from tunesmith.kernels.attention import Heads, Scores
from tunesmith.models.layer_call import LayerShape
from tunesmith.models.override import is_patched
from tunesmith.models.projections import NotFusableError, read_projection
from tunesmith.planning.architectures import ACTIVATIONS, Architecture


def heads_of(config: Any) -> Heads:
    """Layout of the fused q, k, v buffer of a model with this config."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Heads(config.num_attention_heads, config.num_key_value_heads, size)


def linear_paths(row: Architecture) -> tuple[tuple[str, ...], ...]:
    """Paths of the projections, by group."""
    return row.qkv, (row.output,), row.gate_up, (row.down,)


def norm_paths(row: Architecture) -> tuple[str | None, ...]:
    """Paths of the norms, in the order of `Norms`."""
    return *row.norms, *(row.qk_norms or (None, None))


def shape_of(config: Any, row: Architecture, layer: Any) -> LayerShape:
    """A layer's constants, those that differ between layers read from its modules."""

    def constant(path: str | None) -> Any:
        return None if path is None else attrgetter(path)(layer)

    multiplier = constant(row.residual_multiplier)
    return LayerShape(
        heads=heads_of(config),
        eps=float(getattr(config, row.eps)),
        activation=ACTIVATIONS[getattr(config, row.activation)],
        gated=row.gated,
        norm=row.norm,
        norm_offset=row.norm_offset,
        parallel=row.parallel,
        residual_multiplier=1.0 if multiplier is None else float(multiplier),
        scores=Scores(float(layer.self_attn.scaling), constant(row.window), constant(row.softcap)),
        rope=row.rope is None or bool(constant(row.rope)),
        interleaved=row.interleaved,
        qk_full=row.qk_full,
    )


class Part(NamedTuple):
    """A module inside a layer whose computation the fused node stands for: a block, its activation or a norm."""

    name: str
    get: Callable[[Any], Any]
    kind: type


def _own_class(kind: type) -> type:
    """A class, without the one that FSDP2 puts over it."""
    return next(own for own in kind.__mro__ if not own.__module__.startswith("torch.distributed."))


def _inside(module: Any) -> Any:
    """The module that computes: PEFT puts a copy that trains beside a module of `modules_to_save`."""
    if type(module).__name__ != "ModulesToSaveWrapper":
        return module
    name = next(iter(module.active_adapters), None)
    copied = name in module.modules_to_save and not module.disable_adapters
    return module.modules_to_save[name] if copied else module.original_module


def _is_hooked(module: Any) -> bool:
    """Whether a call of the module runs hooks, other than those by which transformers records what it returns."""
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    if not module._forward_hooks:
        return False
    homes = {getattr(hook, "__module__", "") for hook in module._forward_hooks.values()}
    return homes != {"transformers.utils.output_capturing"}


def check_parts(layer: Any, parts: tuple[Part, ...]) -> None:
    """Raise `NotFusableError` where a part is of another class at this call, or has hooks.

    Modules are looked up at every call: PEFT replaces them, and a deep copy has its own.
    """
    for name, get, kind in parts:
        module = get(layer)
        hooked = _is_hooked(module)
        if type(module) is not kind:
            inside = _inside(module)
            if _own_class(type(inside)) is not kind:
                raise NotFusableError(f"{name}: it is a {type(inside).__name__}")
            hooked = hooked or _is_hooked(inside)
        if hooked:
            raise NotFusableError(f"{name}: it has hooks, which a fused layer does not run")


def parts_of(config: Any, row: Architecture, layer: Any) -> tuple[Part, ...]:
    """The parts of a layer, each as its family has it.

    Raises:
        NotFusableError: one is of a class that its family does not have there, or its `forward` was replaced.
    """
    home = _own_class(type(layer)).__module__
    parts = []
    for name in dict.fromkeys(("self_attn", "mlp", row.act, *filter(None, norm_paths(row)))):
        get = attrgetter(name)
        module = _inside(get(layer))
        kind = _own_class(type(module))
        if name == row.act:
            own = kind is type(ACT2FN[getattr(config, row.activation)])
        else:
            own = kind.__module__ == home or (row.norm == "layer" and kind is nn.LayerNorm)
        if not own:
            raise NotFusableError(f"{name}: it is a {kind.__name__}, not what its family has there")
        if is_patched(module):
            raise NotFusableError(f"{name}: its forward was replaced")
        parts.append(Part(name, get, kind))
    return tuple(parts)


def check_layer(layer: Any, row: Architecture) -> None:
    """Raise `NotFusableError` for a layer that the fused node does not compute, as it is now."""
    own = _own_class(type(layer))
    if not own.__module__.startswith("transformers."):
        raise NotFusableError(f"its class {own.__name__} is not one of transformers")
    if is_patched(layer):
        raise NotFusableError("its forward was replaced")
    for name in (name for group in linear_paths(row) for name in group):
        try:
            read_projection(attrgetter(name)(layer))
        except NotFusableError as error:
            raise NotFusableError(f"{name}: {error}") from error
