"""From a parsed `config.json` to `ModelFacts`. Torch-free.

Only transformers builds a model from a config; this reads the sizes of what it would build. For the families of
`ARCHITECTURES` the facts are exact: a test compares them with models that transformers builds. Of others, mixtures of
experts among them, `read_other` says as much as the usual names of a config tell.

Rejected: transformers' own config classes. They load in seconds, and a plan is asked for in between two edits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from tunesmith.planning.architectures import ARCHITECTURES, Architecture, find_architecture
from tunesmith.planning.facts import LayerFacts, ModelFacts
from tunesmith.planning.family_defaults import DEFAULTS
from tunesmith.planning.read_other import read_other
from tunesmith.planning.read_sizes import layer_count, missing, needed, optional, refuse
from tunesmith.planning.vision import vision_parameters

_ATTENTION = {"qkv": "attention_bias", "output": "attention_bias"}
_MLP = {"gate_up": "mlp_bias", "down": "mlp_bias"}

_BIASES: dict[str, dict[str, str | bool]] = {
    "llama": {**_ATTENTION, **_MLP},
    "mistral": {},
    "qwen2": {"qkv": True},
    "qwen3": {**_ATTENTION},
    "gemma2": {**_ATTENTION},
    "gemma3_text": {**_ATTENTION},
    "phi3": {},
    "gemma": {**_ATTENTION},
    "ministral": {},
    "granite": {**_ATTENTION, **_MLP},
    "olmo2": {**_ATTENTION},
    "olmo3": {**_ATTENTION},
    "smollm3": {**_ATTENTION, **_MLP},
    "cohere": {**_ATTENTION},
    "cohere2": {**_ATTENTION},
    "glm4": {"qkv": "attention_bias"},
    "glm": {"qkv": "attention_bias"},
    "starcoder2": dict.fromkeys(("qkv", "output", "gate_up", "down"), "use_bias"),
}
"""Groups of projections that may have a bias: the name in the config that says so, or True where they always do."""

_PARTIAL = {"phi3": 1.0, "glm4": 0.5, "glm": 0.5}
"""Families of which a share of each head rotates, and how much of it where the config does not say."""


def read_facts(config: Mapping[str, Any], name: str) -> ModelFacts:
    """Sizes of a causal language model, from its config alone.

    Args:
        config: a parsed `config.json`, as `save_pretrained` writes it or as it lies on the hub.
        name: what the user calls the model.

    Raises:
        UserError: it is no config of a causal language model, or the sizes that a plan needs are not in it.
    """
    text = text_part(config, name)
    beside = vision_parameters(config, text, name)
    model_type = text.get("model_type")
    if not isinstance(model_type, str):
        raise missing(name, "model_type")
    try:
        if model_type not in ARCHITECTURES:
            facts = read_other(text, name)
        else:
            facts = _read_family(SimpleNamespace(**{**DEFAULTS[model_type], **text}), name)
    except (TypeError, ValueError, ZeroDivisionError) as error:  # a word for a number, a number for a list
        raise refuse(name, f"one of its values is not of the kind that it should be ({error})") from error
    return replace(facts, other_parameters=beside)


def text_part(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The config of the language model, which has a place of its own where a model also sees.

    Raises:
        UserError: it is of another kind of model.
    """
    if config.get("is_encoder_decoder"):
        raise refuse(name, "it is an encoder and a decoder")
    written = config.get("architectures")
    if isinstance(written, list) and written and all(str(one).endswith("ForMaskedLM") for one in written):
        raise refuse(name, "it fills in masked words and does not go on with a text")
    inner = config.get("text_config")
    if inner is None:
        return dict(config)
    if not isinstance(inner, Mapping):
        raise refuse(name, "its text_config is no set of names and values")
    text = dict(inner)
    if "model_type" not in text and isinstance(config.get("model_type"), str):
        text["model_type"] = f"{config['model_type']}_text"
    if "tie_word_embeddings" in config:  # the whole model's decides
        text["tie_word_embeddings"] = config["tie_word_embeddings"]
    return text


def _read_family(config: SimpleNamespace, name: str) -> ModelFacts:
    """A model of a family that is known, whether or not its layers are fused."""
    row = ARCHITECTURES[config.model_type]
    _, unfused = find_architecture(config)
    count = layer_count(config, name)
    layer = _layer(config, row, name)
    rotary = _rotates(config, row, count, name)
    windows = _windows(config, row, rotary, name)
    if row.rope == "self_attn.sliding_window":  # layers that see everything know no positions
        rotary = [window is not None for window in windows]
    layers = tuple(
        replace(layer, window=window, rotary_dim=layer.rotary_dim if turns else 0)
        for window, turns in zip(windows, rotary, strict=True)
    )
    return ModelFacts(
        name=name,
        model_type=config.model_type,
        layers=layers,
        vocabulary=needed(config, "vocab_size", name),
        tied=bool(config.tie_word_embeddings),
        longest=optional(config, "max_position_embeddings", name),
        unfused=unfused,
    )


def _layer(config: SimpleNamespace, row: Architecture, name: str) -> LayerFacts:
    """The layer that all layers are but for their windows and positions."""
    hidden, heads = needed(config, "hidden_size", name), needed(config, "num_attention_heads", name)
    head_dim = needed(config, "head_dim", name) if getattr(config, "head_dim", None) else hidden // heads
    kv_heads = needed(config, "num_key_value_heads", name) if config.num_key_value_heads else heads
    biases = {
        f"{group}_bias": said if isinstance(said, bool) else bool(getattr(config, said))
        for group, said in _BIASES[config.model_type].items()
    }
    cohere_norms = config.model_type == "cohere" and bool(config.use_qk_norm)
    return LayerFacts(
        hidden=hidden,
        inner=needed(config, "intermediate_size", name),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rotary_dim=int(head_dim * _rotary_share(config)),
        gated=row.gated,
        qkv_parts=len(row.qkv),
        gate_up_parts=len(row.gate_up),
        norms=(
            row.norms.before_attention is not None,
            row.norms.behind_attention is not None,
            row.norms.before_mlp is not None,
            row.norms.behind_mlp is not None,
        ),
        layer_norm=row.norm == "layer",
        norm_bias=config.model_type == "starcoder2",
        # Command R's norms of q and k have a weight for each column of each head
        qk_norm=row.qk_norms is not None or cohere_norms,
        qk_full=row.qk_full or cohere_norms,
        parallel=row.parallel,
        softcap=row.softcap is not None and config.attn_logit_softcapping is not None,
        **biases,
    )


def _rotary_share(config: SimpleNamespace) -> float:
    """The share of a head's columns that rotate."""
    if config.model_type not in _PARTIAL:
        return 1.0
    inside = getattr(config, "rope_parameters", None) or {}
    share = getattr(config, "partial_rotary_factor", None)
    share = inside.get("partial_rotary_factor", share) if isinstance(inside, Mapping) else share
    return _PARTIAL[config.model_type] if share is None else float(share)


def _rotates(config: SimpleNamespace, row: Architecture, count: int, name: str) -> list[bool]:
    """Whether each layer has rotary positions, where the config says so itself."""
    if row.rope != "self_attn.use_rope":
        return [True] * count
    listed = getattr(config, "no_rope_layers", None)
    if listed is None:
        every = config.no_rope_layer_interval
        return [(number + 1) % every != 0 for number in range(count)]
    return [bool(turns) for turns in _of_each_layer(listed, count, "no_rope_layers", name)]


# ---------------------------------------------------------------- windows


_SEES_ALL = {"gemma2": 2, "gemma3_text": 6, "olmo3": 4, "cohere2": 4}
"""Families of which every so many-th layer sees all keys, where the config does not list its layers."""

_SAYS_WHICH = {"gemma3_text", "cohere2"}
"""Those of them whose config may say how many-th, by an older name."""

_ALL_ALIKE = {"mistral", "phi3", "starcoder2"}
"""Families whose layers do not read `layer_types`."""


def _slides(config: SimpleNamespace, rotates: list[bool], number: int) -> bool:
    """Whether a layer looks at the last keys only, where the config does not list it."""
    family = config.model_type
    if family in _SEES_ALL:
        said = getattr(config, "sliding_window_pattern", None) if family in _SAYS_WHICH else None
        return bool((number + 1) % (said or _SEES_ALL[family]))
    if family in ("qwen2", "qwen3"):
        return bool(number >= config.max_window_layers)
    return family != "smollm3" or not rotates[number]


def _windows(config: SimpleNamespace, row: Architecture, rotates: list[bool], name: str) -> list[int | None]:
    """The window of each layer in keys, None where it sees all that came before."""
    window, count = getattr(config, "sliding_window", None), len(rotates)
    if row.window is None or not window or not getattr(config, "use_sliding_window", True):
        return [None] * count
    listed = None if config.model_type in _ALL_ALIKE else getattr(config, "layer_types", None)
    if listed is None:
        slides = [_slides(config, rotates, number) for number in range(count)]
    else:
        kinds = _of_each_layer(listed, count, "layer_types", name)
        slides = [kind == "sliding_attention" for kind in kinds]
    return [int(window) if slide else None for slide in slides]


def _of_each_layer(listed: Any, count: int, key: str, name: str) -> list[Any]:
    """A list with an entry for each layer.

    Raises:
        UserError: it is none, or has fewer entries.
    """
    if not isinstance(listed, list | tuple) or len(listed) < count:
        raise refuse(name, f"its {key} does not have an entry for each of its {count} layers")
    return list(listed[:count])
