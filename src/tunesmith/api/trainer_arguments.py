"""Arguments of TRL's SFTTrainer as scripts of 2024 give them, turned into today's `SFTConfig`.

In 2024 the trainer itself took what is in `SFTConfig` now, and a plain `TrainingArguments` beside it. Where both name
the same thing differently, that is an error in one sentence; nothing is dropped in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

import torch
from transformers import TrainingArguments
from trl.trainer.sft_config import SFTConfig

from tunesmith.api.arguments import Foreign
from tunesmith.api.facts import Facts
from tunesmith.api.kept_out import kept_out
from tunesmith.contracts.errors import UserError
from tunesmith.models.base_of import base_of

MOVED: dict[str, str] = {
    "dataset_kwargs": "dataset_kwargs",
    "dataset_num_proc": "dataset_num_proc",
    "dataset_text_field": "dataset_text_field",
    "eval_packing": "eval_packing",
    "max_seq_length": "max_length",
    "neftune_noise_alpha": "neftune_noise_alpha",
    "packing": "packing",
}
"""An argument of the trainer in 2024, and the field of `SFTConfig` that it is today."""

_READ_WHOLE = "Data sets are tokenised whole before training."
TRAINING: dict[str, Foreign] = {
    "chars_per_token": Foreign((3.6, None), _READ_WHOLE, "Leave it out."),
    "dataset_batch_size": Foreign(
        None, "The size of a batch of the tokeniser changes nothing but its speed."
    ),
    "infinite": Foreign((False, None), _READ_WHOLE, "Say how long to train with max_steps."),
    "model_init": Foreign((None,), "The model is made by FastLanguageModel.", "Give the model itself."),
    "model_init_kwargs": Foreign((None,), "The model is loaded already.", "Give them to from_pretrained."),
    "num_of_sequences": Foreign((1024, None), _READ_WHOLE, "Leave it out."),
}
"""Further arguments of 2024, accepted or refused."""


def _values(args: TrainingArguments) -> dict[str, Any]:
    values: dict[str, Any] = args.to_dict()
    hidden = {field.name for field in fields(args) if field.name.endswith("_token")}  # `to_dict` masks them
    return {
        name: kept_out(name, getattr(args, name) if name in hidden else value)
        for name, value in values.items()
        if name in {field.name for field in fields(args) if field.init}
    }


def _default(name: str) -> Any:
    field = next(field for field in fields(SFTConfig) if field.name == name)
    return field.default if field.default is not MISSING else None


def make_config(
    args: TrainingArguments | None, moved: Mapping[str, Any], model: Any, facts: Facts | None
) -> SFTConfig:
    """`SFTConfig` from what a script gives.

    Args:
        args: today's or the plain arguments; None takes the defaults.
        moved: arguments of `MOVED` that were given to the trainer.
        model: whose `max_seq_length` holds where nothing else says how long rows may be; TRL's own default of
            `max_length` says nothing.
        facts: of a model of ours.

    Raises:
        UserError: two places contradict each other.
    """
    on_gpu = next(model.parameters()).device.type == "cuda"
    kind = type(args) if isinstance(args, SFTConfig) else SFTConfig
    values = _values(args) if args is not None else _defaults(model, on_gpu)
    for argument, value in moved.items():
        field = MOVED[argument]
        if value is None:
            continue
        given = values.get(field, _default(field))
        if given not in (value, _default(field)):
            raise UserError(
                f"SFTTrainer: {argument}={value!r}, and args has {field}={given!r}.",
                hint="Say it in one place.",
            )
        values[field] = value
    # SFTConfig's own default is nobody's wish
    unsaid = values.get("max_length", _default("max_length")) == _default("max_length")
    if unsaid and moved.get("max_seq_length") is None and hasattr(model, "max_seq_length"):
        values["max_length"] = model.max_seq_length
    if facts is not None:
        _leave_memory_to_model(args, values, facts)
    if not on_gpu:
        values["dataloader_pin_memory"] = False  # torch warns of it at every loader
    if not on_gpu and (values.get("fp16") or values.get("fp16_full_eval")):
        values |= {"fp16": False, "fp16_full_eval": False}
        line = "tunesmith: fp16 is for GPUs; this CPU computes in float32."
        print(line, flush=True) if facts is None else facts.say(line)
    config = kind(**values)
    if facts is not None and config.n_gpu > 1:
        # nn.DataParallel calls the first GPU's layers everywhere; without it the batch would still be that of all
        config._n_gpu = 1
        facts.say("tunesmith: a process trains on one GPU; the others here are left alone.")
    return config


def _defaults(model: Any, on_gpu: bool) -> dict[str, Any]:
    name = str(getattr(model.config, "_name_or_path", "model")).rstrip("/").rsplit("/", 1)[-1]
    return {
        "output_dir": f"{name}-SFT",
        "bf16": on_gpu and model.dtype == torch.bfloat16,
        "fp16": on_gpu and model.dtype == torch.float16,
    }


def _leave_memory_to_model(args: TrainingArguments | None, values: dict[str, Any], facts: Facts) -> None:
    """What is kept between forward and backward was said to `get_peft_model`; the trainer would overrule it."""
    if (
        args is not None
        and not isinstance(args, SFTConfig)  # where it is on unless somebody switches it off
        and args.gradient_checkpointing
        and facts.checkpointing is False
    ):
        raise UserError(
            "SFTTrainer: args has gradient_checkpointing=True, and the model use_gradient_checkpointing=False.",
            hint="Say it in one place: get_peft_model's use_gradient_checkpointing.",
        )
    # newer transformers call it by the second name and keep the first in step with it
    for name in {
        "gradient_checkpointing",
        "activation_checkpointing",
    } & SFTConfig.__dataclass_fields__.keys():
        values[name] = False


def check_columns(name: str, dataset: Any, field: str, formatting: Any) -> None:
    """Refuse a data set that is empty, or without any column that trains.

    Args:
        name: `train_dataset` or `eval_dataset`.
        field: where its text stands.
        formatting: a function that makes the text, which may read any columns.

    Raises:
        UserError: with the columns that there are.
    """
    if not isinstance(field, str):
        raise UserError(f"SFTTrainer: dataset_text_field is {field!r}, and has to be the name of a column.")
    for part in dataset.values() if isinstance(dataset, dict) else [dataset]:
        if hasattr(part, "__len__") and hasattr(part, "column_names") and len(part) == 0:
            raise UserError(f"SFTTrainer: {name} has no rows.")
        columns = getattr(part, "column_names", None)
        if not columns or formatting is not None:
            continue
        pair = {"prompt", "completion"} <= set(columns)
        if not pair and not {field, "input_ids", "messages", "conversations"} & set(columns):
            raise UserError(
                f"SFTTrainer: {name} has no column {field!r}.",
                hint=f"It has {', '.join(columns)}; say which holds the text with dataset_text_field=.",
            )


def check_rates(model: Any, loraplus: float | None, embedding: float | None, *, with_peft: bool) -> None:
    """Refuse learning rates that are none, and one for embeddings that do not train.

    Args:
        loraplus: rate of the B matrices over that of the others.
        embedding: rate of embeddings and head.
        with_peft: whether the trainer puts an adapter on first, of which nothing is known yet.

    Raises:
        UserError: with what to do.
    """
    for name, rate in (("loraplus_lr_ratio", loraplus), ("embedding_learning_rate", embedding)):
        if rate is not None and not (isinstance(rate, int | float) and rate > 0):
            raise UserError(f"SFTTrainer: {name} is {rate!r}, and has to be a number above 0.")
    if embedding is not None and not with_peft and not _embeddings_train(model):
        raise UserError(
            "SFTTrainer: embedding_learning_rate is given, and neither embeddings nor head train.",
            hint='Train them with get_peft_model(..., modules_to_save=["embed_tokens", "lm_head"]), or leave it out.',
        )


def _embeddings_train(model: Any) -> bool:
    """Whether anything of embeddings or head trains, adapters on the head excepted."""
    base = base_of(model)
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    return any(
        parameter.requires_grad
        for module in ends
        if module is not None
        for name, parameter in module.named_parameters()
        if "lora_" not in name
    )
