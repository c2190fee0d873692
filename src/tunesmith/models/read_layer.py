"""What a decoder layer of a family is: where its projections and norms stand, and what is constant in it."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from tunesmith.kernels.attention import Heads, Scores
from tunesmith.models.layer_call import LayerShape
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


def check_layer(layer: Any, row: Architecture) -> None:
    """Raise `NotFusableError` for a layer that the fused node does not compute, as it is now."""
    own = next(
        kind for kind in type(layer).__mro__ if not kind.__module__.startswith("torch.")
    )  # FSDP2 wraps classes
    if not own.__module__.startswith("transformers."):
        raise NotFusableError(f"its class {own.__name__} is not one of transformers")
    for name in (name for group in linear_paths(row) for name in group):
        try:
            read_projection(attrgetter(name)(layer))
        except NotFusableError as error:
            raise NotFusableError(f"{name}: {error}") from error
    for name in filter(None, norm_paths(row)):
        attrgetter(name)(layer)
