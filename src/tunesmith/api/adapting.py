"""`get_peft_model`: a LoRA adapter of PEFT on a loaded model, and the fused layers on both."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tunesmith.api.arguments import ADAPTING, check_foreign
from tunesmith.api.facts import Facts, need_facts
from tunesmith.api.memory import policies_of
from tunesmith.api.prepared import equip, note_length, put_on
from tunesmith.api.values import ADAPTED, check_values, names
from tunesmith.api.wording import in_arguments
from tunesmith.contracts.errors import UserError
from tunesmith.models.adapter import add_lora
from tunesmith.models.adapter_targets import ALL, ends_in, left_out_rows, taken_for_experts
from tunesmith.models.base_of import base_of
from tunesmith.models.vocabulary import trainable_rows


def get_peft_model(
    model: Any,
    r: int = 16,
    target_modules: str | Sequence[str] | None = None,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    bias: str = "none",
    layers_to_transform: Sequence[int] | int | None = None,
    layers_pattern: str | Sequence[str] | None = None,
    use_gradient_checkpointing: bool | str = "unsloth",
    random_state: int = 3407,
    max_seq_length: int | None = None,
    use_rslora: bool = False,
    use_dora: bool = False,
    modules_to_save: Sequence[str] | None = None,
    init_lora_weights: bool | str = True,
    loftq_config: Mapping[str, Any] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
    trainable_token_indices: Any = None,
    lora_bias: bool = False,
    quiet: bool | None = None,
    **foreign: Any,
) -> Any:
    """Put a LoRA adapter on a model of `from_pretrained`, and the fused layers on both.

    Args:
        model: of `from_pretrained`. One that carries an adapter already keeps it if the arguments say the same.
        r: rank.
        target_modules: name endings, `"all-linear"` (as None: every linear layer but the head), or a regular
            expression that whole names match.
        lora_alpha: the adapter's output is scaled by `lora_alpha / r`.
        lora_dropout: dropout on the adapter's input.
        bias: `"none"`, or train biases as well: `"all"`, or `"lora_only"`, those of layers with an adapter.
        layers_to_transform: numbers of the decoder layers that get an adapter; the last n are
            `range(layers - n, layers)`.
        layers_pattern: PEFT's name of the list of layers, where it is none of the usual ones.
        use_gradient_checkpointing: what is kept between forward and backward: `"unsloth"` the least, True, False
            everything, `"auto"` the most that fits.
        random_state: seeds the adapter.
        max_seq_length: longest row in tokens; None leaves it as it was loaded.
        use_rslora: scale by `lora_alpha / √r` instead.
        use_dora: train the lengths of weight rows apart from their directions. Not fused.
        modules_to_save: modules that train whole beside the adapter, `["embed_tokens", "lm_head"]`.
        init_lora_weights: True, False, `"gaussian"`, `"pissa"`, `"olora"`, or `"loftq"` on a 4-bit base.
        loftq_config: `{"loftq_bits": 4, "loftq_iter": 1}` beside `"loftq"`, and nothing else.
        rank_pattern: ranks of their own, by name ending or regular expression.
        alpha_pattern: alphas of their own.
        exclude_modules: name endings or a regular expression of layers that get no adapter.
        trainable_token_indices: ids of tokens whose rows train, in embeddings and head, see `add_new_tokens`.
        lora_bias: give the adapter's B matrix a bias. Not fused.
        quiet: print nothing from now on, or again; None leaves it as it is.
        foreign: arguments of Unsloth that change nothing here, or are refused with their reason.

    Returns:
        A `peft.PeftModel`.

    Raises:
        UserError: what an argument names is not there, or an argument asks for what is not possible.
        TypeError: an argument that nobody knows.
    """
    check_foreign(get_peft_model, ADAPTING, foreign)
    given: dict[str, Any] = {
        "r": r,
        "target_modules": target_modules,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "bias": bias,
        "layers_to_transform": layers_to_transform,
        "layers_pattern": layers_pattern,
        "use_rslora": use_rslora,
        "use_dora": use_dora,
        "modules_to_save": names(modules_to_save),
        "init_lora_weights": init_lora_weights,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "exclude_modules": exclude_modules,
        "trainable_token_indices": trainable_token_indices,
        "lora_bias": lora_bias,
        "random_state": random_state,
    }
    check_values("get_peft_model", ADAPTED, given | {"max_seq_length": max_seq_length})
    policies_of(use_gradient_checkpointing)
    facts = need_facts(model, "get_peft_model")
    facts.quiet = facts.quiet if quiet is None else quiet
    _check_frozen(facts)
    _check_loftq(init_lora_weights, loftq_config)
    if hasattr(model, "peft_config"):
        _check_same(model, given)
    else:
        model = _add(model, given, facts)
    equip(model, max_seq_length or model.max_seq_length)
    if max_seq_length is not None:
        note_length(facts, model)
    put_on(model, facts, use_gradient_checkpointing)
    return model


_OTHER_NAMES = {
    "r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "targets",
    "random_state": "seed",
}  # fmt: skip
"""An argument, and what `add_lora` calls it."""


def _add(model: Any, given: Mapping[str, Any], facts: Facts) -> Any:
    """The model with the adapter that the arguments ask for; its facts learn what that leaves out."""
    arguments = {_OTHER_NAMES.get(name, name): value for name, value in given.items()}
    if arguments["targets"] is None:
        arguments["targets"] = ALL
    if isinstance(ids := arguments["trainable_token_indices"], Sequence):
        arguments["trainable_token_indices"] = trainable_rows(model, ids, arguments["modules_to_save"])
    with in_arguments():
        model = add_lora(model, **arguments)
    facts.left_out = left_out_rows(base_of(model), arguments["targets"])
    return model


def _check_frozen(facts: Facts) -> None:
    if facts.full:
        raise UserError(
            "get_peft_model: this model was loaded with full_finetuning=True, its own weights are trained.",
            hint="Leave out get_peft_model, or full_finetuning.",
        )


def _check_loftq(start: bool | str, config: Mapping[str, Any] | None) -> None:
    if not config:
        return
    if start != "loftq":
        raise UserError(
            f"loftq_config is for init_lora_weights='loftq', and that is {start!r}.",
            hint="Leave one of them out.",
        )
    known = {"loftq_bits": 4, "loftq_iter": 1}
    for name, value in config.items():
        if known.get(name) != value:
            raise UserError(
                f"loftq_config: {name}={value!r} is not possible; the base is held in 4 bits and made up for once.",
                hint="Leave loftq_config out.",
            )


_COMPARED = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias", "lora_bias")
"""Arguments that PEFT's config holds as they were given; those below are compared where they are."""
_COMPARED_WHERE_GIVEN = (
    "layers_to_transform", "rank_pattern", "alpha_pattern", "exclude_modules", "trainable_token_indices",
)  # fmt: skip


def _check_same(model: Any, given: Mapping[str, Any]) -> None:
    """Refuse other arguments than those of the adapter that a model carries already."""
    config = model.peft_config[model.active_adapters[0]]
    for field in _COMPARED:
        if getattr(config, field) != given[field]:
            raise _other(field, getattr(config, field), given[field])
    for field in _COMPARED_WHERE_GIVEN:
        own, asked = getattr(config, field), given[field]
        if isinstance(own, Mapping) and isinstance(asked, Sequence):  # ids of tokens, by module
            own = sorted({number for numbers in own.values() for number in numbers})
        if asked is not None and _plain(own) != _plain(asked):
            raise _other(field, own, asked)
    modules = dict(base_of(model).named_modules())
    # PEFT's config may hold these in other words than were given, so they are looked up in the model
    adapted = [name for name, module in modules.items() if hasattr(module, "lora_A")]
    if not _are_targets(base_of(model), adapted, given["target_modules"]):
        raise _other("target_modules", sorted({_last(name) for name in adapted}), given["target_modules"])
    for wanted in given["modules_to_save"]:
        found = [module for name, module in modules.items() if ends_in(name, wanted)]
        if not any(parameter.requires_grad for module in found for parameter in module.parameters()):
            raise _other("modules_to_save", config.modules_to_save, given["modules_to_save"])


def _are_targets(base: Any, adapted: Sequence[str], targets: str | Sequence[str] | None) -> bool:
    """Whether the layers that carry an adapter are those that targets name; experts have names of PEFT's own."""
    if targets is None or targets == ALL:
        return True
    layers = [name for name in adapted if not hasattr(base.get_submodule(name), "parameter_name")]
    if isinstance(targets, str):
        return all(re.fullmatch(targets, name) for name in layers)
    kind = base.config.model_type
    named = {_last(name) for name in targets if not taken_for_experts(kind, _last(name))}
    return {_last(name) for name in layers} == named


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _plain(value: Any) -> Any:
    """A value for comparison: names in any order and container, one number as a list of it, nothing as None."""
    if isinstance(value, int):
        return {value}
    return (value if isinstance(value, Mapping | str) else set(value)) if value else None


def _other(field: str, own: Any, asked: Any) -> UserError:
    return UserError(
        f"get_peft_model: the model carries an adapter with {field}={own!r} already, and {field}={asked!r} asks for "
        "another.",
        hint="Leave out get_peft_model to train that adapter on, or load the base model for a new one.",
    )
