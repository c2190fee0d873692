"""Rules between settings: each valid alone, not together. One row a rule; all are checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tunesmith.settings.data import HeldOutSettings
from tunesmith.settings.model import AdapterSettings
from tunesmith.settings.rope import scaling_problems
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


def _measures(settings: RunSettings) -> bool:
    """Whether the settings ask for a held-out loss, and for rows that measure it."""
    return settings.output.eval_every is not None and _holds_out(settings)


def _holds_out(settings: RunSettings) -> bool:
    held = settings.data.eval
    return held.fraction > 0 if isinstance(held, HeldOutSettings) else bool(held)


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
        ("train", "optimizer"),
        lambda s: s.train.optimizer == "muon" and s.adapter.kind != "none",
        "train.optimizer: muon beside an adapter",
        "Muon makes the step of a whole weight matrix orthogonal, which is not what orthogonal steps of an adapter's "
        "two factors make of it: use adamw, or train the model itself with adapter.kind: none",
    ),
    Rule(
        ("train", "scheduler"),
        lambda s: s.train.optimizer == "schedule_free_adamw" and s.train.scheduler != "constant",
        "train.optimizer: schedule_free_adamw beside a schedule",
        "its average of the weights takes the place of a falling rate: write scheduler: constant; warm-up stays",
    ),
    Rule(
        ("train", "betas"),
        lambda s: s.train.optimizer == "schedule_free_adamw" and s.train.betas[0] <= 0,
        "train.betas starts with 0, and schedule_free_adamw takes gradients that much of the way to its average",
        "set the first to 0.9 or so",
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
        ("train", "noise_scale"),
        lambda s: (
            s.train.noise_scale is not False
            and isinstance(s.train.global_batch, int)
            and s.train.micro_batch == s.train.global_batch
        ),
        "train.noise_scale, and train.micro_batch is the whole train.global_batch",
        "it compares micro-batches with their step: set train.micro_batch to half of train.global_batch or less",
    ),
    Rule(
        ("train", "early_stopping"),
        lambda s: s.train.early_stopping is not None and not _measures(s),
        "train.early_stopping, and no held-out loss is measured",
        "it watches that loss: set output.eval_every, and data.eval to a fraction above 0 or to sources",
    ),
    Rule(
        ("output", "result"),
        lambda s: s.output.result == "best" and not _measures(s),
        "output.result: best, and no held-out loss is measured",
        "the best is chosen by that loss: set output.eval_every, and data.eval to a fraction above 0 or to sources",
    ),
    Rule(
        ("output", "track"),
        lambda s: len(set(s.output.track)) < len(s.output.track),
        "output.track names a tracker twice",
        "name each once",
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
        ("train", "steps"),
        lambda s: isinstance(s.train.steps, str),
        "train.steps counts tokens, and data.streaming is on",
        "how many steps hold so many tokens of a stream is not known before it is read, and the learning rate needs "
        "to know: write a number of steps",
    ),
    Rule(
        ("output", "sample_every"),
        lambda s: s.output.sample_every is not None and s.output.sample_prompts is None and not _holds_out(s),
        "output.sample_every with data.streaming, and nothing to ask",
        "prompts are not taken out of a stream: write output.sample_prompts, or name sources under data.eval",
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
    scaling = settings.model.rope_scaling
    for name, found, expected in scaling_problems(scaling.parameters()) if scaling is not None else ():
        yield ("model", "rope_scaling", name), f"model.rope_scaling: {found}", expected
    for number, group in enumerate(settings.train.groups):
        if group.learning_rate is None and group.weight_decay is None:
            place = f"train.groups.{number}"
            yield (
                ("train", "groups", number),
                f"{place} changes nothing",
                "a group needs learning_rate or weight_decay",
            )
    for axis in _AXES:
        size = getattr(settings.parallel, axis)
        if size > 1:
            yield (
                ("parallel", axis),
                f"parallel.{axis} is {size}",
                "this version trains on one device, so it must be 1",
            )
