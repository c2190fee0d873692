"""Rules between settings: each valid alone, not together. One row a rule; all are checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tunesmith.settings.data import HeldOutSettings
from tunesmith.settings.model import AdapterSettings
from tunesmith.settings.run import ParallelSettings, RunSettings

Broken = tuple[tuple[str | int, ...], str, str]
"""Path of the setting, what stood there, what was expected."""


@dataclass(frozen=True, slots=True)
class Rule:
    """`path` is wrong where `broken` is true."""

    path: tuple[str, ...]
    broken: Callable[[RunSettings], bool]
    found: str
    expected: str


_OF_AN_ADAPTER = (
    "use_rslora",
    "use_dora",
    "init_lora_weights",
    "modules_to_save",
    "layers_to_transform",
    "last_layers",
    "rank_pattern",
    "alpha_pattern",
    "loraplus_lr_ratio",
)
"""Settings that say nothing without an adapter; rank, alpha, dropout and targets may stand in every run file."""

_DEFAULTS = AdapterSettings()


def _only_of_an_adapter(name: str) -> Rule:
    return Rule(
        ("adapter", name),
        lambda s: s.adapter.kind == "none" and getattr(s.adapter, name) != getattr(_DEFAULTS, name),
        f"adapter.{name} with adapter.kind: none",
        "it is of an adapter: remove it, or set adapter.kind: lora",
    )


RULES: tuple[Rule, ...] = (
    Rule(
        ("adapter", "kind"),
        lambda s: s.adapter.kind == "none" and s.model.quantize != "none",
        "adapter.kind is none, and model.quantize is not",
        "weights in 4 or 8 bits cannot be trained themselves: use adapter.kind: lora, or model.quantize: none",
    ),
    Rule(
        ("adapter", "last_layers"),
        lambda s: s.adapter.last_layers is not None and s.adapter.layers_to_transform is not None,
        "adapter.last_layers beside adapter.layers_to_transform",
        "both say which layers get an adapter: remove one",
    ),
    Rule(
        ("adapter", "last_layers"),
        lambda s: (
            s.adapter.last_layers is not None
            and isinstance(s.adapter.targets, str)
            and s.adapter.targets != "all-linear"
        ),
        "adapter.last_layers beside a regular expression in adapter.targets",
        r"the expression chooses layers itself: write them into it, such as `.*\.layers\.(30|31)\..*_proj`",
    ),
    *(_only_of_an_adapter(name) for name in _OF_AN_ADAPTER),
    Rule(
        ("adapter", "embedding_learning_rate"),
        lambda s: (
            s.adapter.embedding_learning_rate is not None
            and s.adapter.kind == "lora"
            and not (s.adapter.path or s.adapter.new_tokens or s.adapter.modules_to_save)
        ),
        "adapter.embedding_learning_rate, and no embeddings train",
        "add adapter.new_tokens, or adapter.modules_to_save: [embed_tokens, lm_head]; or remove it",
    ),
    Rule(
        ("adapter", "new_tokens"),
        lambda s: bool(s.adapter.new_tokens) and s.adapter.path is not None,
        "adapter.new_tokens beside adapter.path",
        "an adapter that has begun knows its tokens: start a new one, or give the model that has them",
    ),
    Rule(
        ("adapter", "init_lora_weights"),
        lambda s: s.adapter.init_lora_weights == "loftq" and s.model.quantize != "nf4",
        "adapter.init_lora_weights: loftq without a 4-bit base",
        "it makes up for the rounding of one: set model.quantize: nf4, or leave it out",
    ),
    Rule(
        ("adapter", "init_lora_weights"),
        lambda s: s.adapter.init_lora_weights in ("pissa", "olora") and s.model.quantize != "none",
        "adapter.init_lora_weights takes a part of each weight out of the base, and the base is quantised",
        "set model.quantize: none, or use loftq on a 4-bit base",
    ),
    Rule(
        ("model", "freeze"),
        lambda s: bool(s.model.freeze) and s.adapter.kind != "none",
        "model.freeze beside an adapter",
        "an adapter already freezes the model: remove it, or train the model itself with adapter.kind: none",
    ),
    Rule(
        ("adapter", "path"),
        lambda s: s.adapter.path is not None and s.adapter.kind == "none",
        "adapter.path with adapter.kind: none",
        "to continue from an adapter set adapter.kind: lora",
    ),
    Rule(
        ("adapter", "targets"),
        lambda s: s.adapter.kind != "none" and not s.adapter.targets,
        "adapter.targets is empty",
        "name the linear layers that get an adapter, or write all-linear",
    ),
    Rule(
        ("train", "micro_batch"),
        lambda s: (
            isinstance(s.train.micro_batch, int)
            and isinstance(s.train.global_batch, int)
            and s.train.micro_batch > s.train.global_batch
        ),
        "train.micro_batch is larger than train.global_batch",
        "a micro-batch is a part of the global batch: lower it, or leave it at auto",
    ),
    Rule(
        ("data", "overlap"),
        lambda s: (
            (s.data.overlong == "split" or s.data.join_texts) and 2 * s.data.overlap > s.train.sequence_length
        ),
        "data.overlap is more than half of train.sequence_length",
        "pieces would mostly repeat each other: lower it",
    ),
)

STREAMING_RULES: tuple[Rule, ...] = (
    Rule(
        ("train", "steps"),
        lambda s: s.train.steps is None,
        "data.streaming without train.steps",
        "a stream has no length that is known: say how many steps to train",
    ),
    Rule(
        ("data", "eval"),
        lambda s: isinstance(s.data.eval, HeldOutSettings) and s.data.eval.fraction > 0,
        "data.eval.fraction beside data.streaming",
        "rows cannot be taken out of a stream that is not read yet: name sources, or write {fraction: 0}",
    ),
    Rule(
        ("data", "mix"),
        lambda s: len(s.data.train) > 1 and s.data.mix.strategy != "interleave",
        "data.streaming with several sources and mix.strategy: concatenate",
        "streams cannot be shuffled together as a whole: write mix: {strategy: interleave}",
    ),
    Rule(
        ("data", "buffer_tokens"),
        lambda s: s.data.buffer_tokens < s.train.sequence_length,
        "data.buffer_tokens is smaller than train.sequence_length",
        "the buffer must hold at least one row, and many more to fill rows well",
    ),
)
"""Rules that hold where `data.streaming` is on."""

_AXES = tuple(name for name in ParallelSettings.model_fields if name != "engine")


def broken_rules(settings: RunSettings) -> Iterator[Broken]:
    """Everything that is wrong between the settings."""
    for rule in (*RULES, *(STREAMING_RULES if settings.data.streaming else ())):
        if rule.broken(settings):
            yield rule.path, rule.found, rule.expected
    for axis in _AXES:
        size = getattr(settings.parallel, axis)
        if size > 1:
            yield (
                ("parallel", axis),
                f"parallel.{axis} is {size}",
                "this version trains on one device, so it must be 1",
            )
