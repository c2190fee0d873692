"""TRL's `SFTTrainer`, which takes the arguments of 2024 as well as today's, and keeps adapters in float32."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from tunesmith.api import silence  # noqa: F401  what TRL imports speaks
from tunesmith.api.arguments import check_foreign
from tunesmith.api.facts import Facts, facts_of
from tunesmith.api.memory import fit_policy, policies_of
from tunesmith.api.texts import as_tokens
from tunesmith.contracts.errors import UserError
from tunesmith.training.fused_adamw import FusedAdamW
from tunesmith.training.fused_adamw_8bit import FusedAdamW8bit
from tunesmith.training.groups import parameter_groups

try:
    from trl.trainer.sft_trainer import SFTTrainer as TrlTrainer
except ModuleNotFoundError as error:
    if not (error.name or "").startswith("trl"):
        raise
    raise UserError(
        "SFTTrainer needs TRL, which is not installed.",
        hint='Install it with `pip install "tunesmith[trl]"`.',
    ) from error

from tunesmith.api.trainer_arguments import (
    MOVED,
    TRAINING,
    check_columns,
    check_rates,
    make_config,
)

_TODAY = frozenset(inspect.signature(TrlTrainer.__init__).parameters)


class SFTTrainer(TrlTrainer):
    """TRL's trainer for a model of `FastLanguageModel`, or any other.

    Args:
        model: what is trained.
        args: `SFTConfig` or `TrainingArguments`.
        tokenizer: the older name of `processing_class`.
        loraplus_lr_ratio: learning rate of the adapter's B matrices over that of the others
            (LoRA+, https://arxiv.org/abs/2402.12354).
        embedding_learning_rate: of embeddings and head where they train; it follows the same schedule.
        more: TRL's arguments, today's and those of 2024: see `trainer_arguments`.

    Raises:
        UserError: two arguments contradict each other, one asks for what is not possible, or nothing trains.
        TypeError: an argument that nobody knows.
    """

    def __init__(
        self,
        model: Any,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        tokenizer: Any = None,
        loraplus_lr_ratio: float | None = None,
        embedding_learning_rate: float | None = None,
        **more: Any,
    ) -> None:
        if tokenizer is not None and processing_class not in (None, tokenizer):
            raise UserError(
                "SFTTrainer: tokenizer and processing_class are two names of one thing, and differ here."
            )
        _check_types(model, args)
        _check_optimizers(more.get("optimizers"), loraplus_lr_ratio, embedding_learning_rate)
        moved = {name: more.pop(name) for name in MOVED if name in more}
        today = {name: more.pop(name) for name in [*more] if name in _TODAY}
        check_foreign(SFTTrainer, TRAINING, more, [*MOVED, *_TODAY])
        facts = facts_of(model)
        trained = {parameter: parameter.data for parameter in model.parameters() if parameter.requires_grad}
        _check_adapter(today.get("peft_config"), trains=bool(trained), ours=facts is not None)
        config = make_config(args, moved, model, facts)
        check_rates(
            model, loraplus_lr_ratio, embedding_learning_rate, with_peft=bool(today.get("peft_config"))
        )
        processing_class = processing_class if processing_class is not None else tokenizer
        formatting, say = today.get("formatting_func"), print if facts is None else facts.say
        data = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        for name, dataset in data.items():
            check_columns(name, dataset, config.dataset_text_field, formatting)
            data[name] = as_tokens(name, dataset, config, formatting, processing_class, say)
        if data["train_dataset"] is not train_dataset:
            today["formatting_func"] = None
        self._rates = (loraplus_lr_ratio, embedding_learning_rate)
        super().__init__(
            model=model,
            args=config,
            data_collator=data_collator,
            processing_class=processing_class,
            **data,
            **today,
        )
        for parameter, before in trained.items():  # TRL rounds adapters on a quantised base to bfloat16
            if parameter.dtype != before.dtype:
                parameter.data = before.to(parameter.device)
        if facts is not None:
            _fit(model, facts, config)
            _say_if_rounded(model, facts, config)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer of `args`, with the rates of LoRA+ and of embeddings; bfloat16 is rounded stochastically."""
        loraplus, embedding = self._rates
        trained: Any = self.model if model is None else model
        rounding = _ROUNDING.get(OptimizerNames(self.args.optim)) if _in_bfloat16(trained) else None
        if self.optimizer is None and (loraplus is not None or embedding is not None or rounding is not None):
            rate = self.args.learning_rate
            groups = parameter_groups(
                trained,
                self.args.weight_decay,
                learning_rate=rate,
                loraplus_lr_ratio=loraplus,
                embedding_learning_rate=embedding,
            )
            for group in groups:
                group["lr"] = rate * group.pop("lr_ratio", 1.0)
            kind, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
                self.args, trained
            )
            if {"params", "model", "optimizer_dict"} & options.keys():
                raise UserError(
                    f"args.optim={self.args.optim!s} makes its own groups of parameters, beside which neither "
                    "loraplus_lr_ratio nor embedding_learning_rate is possible.",
                    hint="Use adamw_torch or adamw_8bit.",
                )
            if rounding is not None:
                kind, options = rounding, {name: options[name] for name in ("lr", "betas", "eps")}
            self.optimizer = kind(groups, **options)
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        return optimizer


_ROUNDING: dict[OptimizerNames, Callable[..., torch.optim.Optimizer]] = {
    OptimizerNames.ADAMW_TORCH: FusedAdamW,
    OptimizerNames.ADAMW_TORCH_FUSED: FusedAdamW,
    OptimizerNames.ADAMW_8BIT: FusedAdamW8bit,
    OptimizerNames.ADAMW_BNB: FusedAdamW8bit,
}
"""An `optim`, and what computes the same and rounds weights in bfloat16 stochastically."""


def _in_bfloat16(model: Any) -> bool:
    return any(p.requires_grad and p.dtype == torch.bfloat16 for p in model.parameters())


def _say_if_rounded(model: Any, facts: Facts, config: Any) -> None:
    if _in_bfloat16(model) and OptimizerNames(config.optim) not in _ROUNDING:
        name = OptimizerNames(config.optim).value
        facts.say(
            f"tunesmith: the weights train in bfloat16, which args.optim={name} rounds to the nearest: small steps "
            "are lost. adamw_torch and adamw_8bit round stochastically."
        )


def _check_types(model: Any, args: Any) -> None:
    if isinstance(model, str):
        raise UserError(
            f"SFTTrainer takes a model, and {model!r} is a name.",
            hint="Load it with FastLanguageModel.from_pretrained.",
        )
    if not hasattr(model, "parameters"):
        raise UserError(
            f"SFTTrainer takes a model, and this is a {type(model).__name__}.",
            hint="from_pretrained returns two things: model, tokenizer = FastLanguageModel.from_pretrained(...).",
        )
    if args is not None and not isinstance(args, TrainingArguments):
        raise UserError(
            f"SFTTrainer: args is a {type(args).__name__}, and has to be an SFTConfig or TrainingArguments."
        )


def _check_adapter(asked: Any, *, trains: bool, ours: bool) -> None:
    """`asked` is `peft_config`; `trains`, whether anything of the model does already; `ours`, who made the model."""
    if not trains and asked is None:
        raise UserError(
            "SFTTrainer: nothing of this model trains.",
            hint="Put an adapter on it with get_peft_model first.",
        )
    if ours and asked is not None:
        raise UserError(
            "SFTTrainer: an adapter that the trainer puts on with peft_config gets no fused layers.",
            hint="Put it on with FastLanguageModel.get_peft_model, and leave out peft_config.",
        )


def _check_optimizers(optimizers: Any, *rates: float | None) -> None:
    if optimizers is not None and optimizers[0] is not None and any(rate is not None for rate in rates):
        raise UserError(
            "SFTTrainer: optimizers brings an optimizer, which has its rates already, so loraplus_lr_ratio and "
            "embedding_learning_rate would change nothing.",
            hint="Leave out optimizers, or give its groups their rates.",
        )


def _fit(model: Any, facts: Facts, config: Any) -> None:
    """Where there is a choice, what is kept is chosen anew now that the size of a micro-batch is known."""
    if facts.attached is not None and len(policies := policies_of(facts.checkpointing)) > 1:
        tokens = config.per_device_train_batch_size * (config.max_length or model.max_seq_length)
        fit_policy(model, facts.attached, policies, tokens)
