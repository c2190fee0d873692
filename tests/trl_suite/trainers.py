"""TRL's trainers and transformers' own on a tiny model, small enough for the fast tests: one builder for each."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from tests.support.tiny import tiny_config, tiny_tokenizer
from tunesmith.models.attach import Attached

STEPS = 5
_WORDS = "natalia sold clips to her friends in april and then half as many in may".split()  # noqa: SIM905


def _texts(count: int, seed: int, most: int = 24) -> list[str]:
    """Sentences of one word and of many, so that every batch is padded."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(_WORDS, k=rng.choice([1, 4, most]))) for _ in range(count)]


def tiny_adapted(*, score: bool = False) -> Any:
    """A two-layer Llama in float32 with a LoRA adapter that is not zero, or one with a score head."""
    torch.manual_seed(0)
    config = tiny_config(initializer_range=0.1, num_labels=1)
    kind = AutoModelForSequenceClassification if score else AutoModelForCausalLM
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules="all-linear",
        task_type="SEQ_CLS" if score else "CAUSAL_LM",
        modules_to_save=["score"] if score else None,
    )
    model = get_peft_model(kind.from_config(config), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def _arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.05,
        "optim": "sgd",  # Adam divides by a gradient's size, and makes a step out of one that is rounding only
        "gradient_checkpointing": True,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 3,
    }
    return values | changes


def _sft(model: Any, folder: Path, **changes: Any) -> Any:
    rows = Dataset.from_list(
        [{"text": text} for text in _texts(64 if changes.get("packing") else 24, seed=1)]
    )
    arguments = SFTConfig(**_arguments(folder, **({"max_length": 64} | changes)))
    return SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tiny_tokenizer())


def _dpo(model: Any, folder: Path, **changes: Any) -> Any:
    columns = zip(_texts(24, 1), _texts(24, 2), _texts(24, 3), strict=True)
    rows = Dataset.from_list([{"prompt": p, "chosen": " " + c, "rejected": " " + r} for p, c, r in columns])
    arguments = DPOConfig(**_arguments(folder, **({"max_length": 64} | changes)))
    return DPOTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tiny_tokenizer())


def _kto(model: Any, folder: Path, **changes: Any) -> Any:
    columns = zip(_texts(24, 1), _texts(24, 2), strict=True)
    rows = [{"prompt": p, "completion": " " + c, "label": n % 3 > 0} for n, (p, c) in enumerate(columns)]
    arguments = KTOConfig(**_arguments(folder, **({"max_length": 64} | changes)))
    return KTOTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer()
    )


def _reward(model: Any, folder: Path, **changes: Any) -> Any:
    columns = zip(_texts(24, 2), _texts(24, 3), strict=True)
    rows = Dataset.from_list([{"chosen": c, "rejected": r} for c, r in columns])
    arguments = RewardConfig(**_arguments(folder, **({"max_length": 64} | changes)))
    return RewardTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tiny_tokenizer())


def _vowels(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


def _grpo(model: Any, folder: Path, **changes: Any) -> Any:
    rows = Dataset.from_list([{"prompt": text} for text in _texts(24, seed=1, most=9)])
    values = {"max_completion_length": 6, "num_generations": 2, "beta": 0.1, "num_iterations": 2}
    arguments = GRPOConfig(**_arguments(folder, **(values | changes)))
    return GRPOTrainer(
        model=model,
        reward_funcs=_vowels,
        args=arguments,
        train_dataset=rows,
        processing_class=tiny_tokenizer(),
    )


def _plain(model: Any, folder: Path, **changes: Any) -> Any:
    tokenizer = tiny_tokenizer()
    rows = Dataset.from_list([{"input_ids": tokenizer(text)["input_ids"]} for text in _texts(24, seed=1)])
    return Trainer(
        model=model,
        args=TrainingArguments(**_arguments(folder, **changes)),
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )


TRAINERS: dict[str, Callable[..., Any]] = {
    "Trainer": _plain,
    "SFT": _sft,
    "DPO": _dpo,
    "KTO": _kto,
    "Reward": _reward,
    "GRPO": _grpo,
}


def run(
    kind: str, folder: Path, attach: Callable[[Any], Attached] | None = None, **changes: Any
) -> tuple[list[float], dict[str, torch.Tensor], Attached | None]:
    """Train a tiny model for `STEPS` steps.

    Returns:
        The loss of every micro-batch, the trained parameters, and what `attach` put on the model.
    """
    model = tiny_adapted(score=kind == "Reward")
    attached = attach(model) if attach is not None else None
    trainer = TRAINERS[kind](model, folder, **changes)
    losses, stock = [], trainer.compute_loss

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        result = stock(*args, **kwargs)
        losses.append(float((result[0] if isinstance(result, tuple) else result).detach()))
        return result

    trainer.compute_loss = compute_loss
    trainer.train()
    assert trainer.state.global_step == STEPS
    trained = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    return losses, trained, attached
