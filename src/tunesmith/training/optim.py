"""The tables of optimizers and learning-rate schedules.

A schedule is used as a pure function of the step number: nothing of it needs saving, and a skipped step does not
shift it. Weight decay is applied to matrices only, not to biases, norm weights and other vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tunesmith.training.fused_adamw import FusedAdamW, fits, plain, rounds
from tunesmith.training.fused_adamw_8bit import FusedAdamW8bit

Factory = Callable[[list[dict[str, Any]], float, tuple[float, float]], torch.optim.Optimizer]


def _adamw(groups: list[dict[str, Any]], rate: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    parameters = [parameter for group in groups for parameter in group["params"]]
    if fits(parameters) or (plain(parameters) and rounds(parameters)):
        return FusedAdamW(groups, lr=rate, betas=betas)
    return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True)


def _adamw_8bit(
    groups: list[dict[str, Any]], rate: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    if plain(parameter for group in groups for parameter in group["params"]):
        return FusedAdamW8bit(groups, lr=rate, betas=betas)
    return _bitsandbytes("AdamW8bit")(groups, rate, betas)


def _sgd(groups: list[dict[str, Any]], rate: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=rate, momentum=betas[0])


def _adafactor(
    groups: list[dict[str, Any]], rate: float, _betas: tuple[float, float]
) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(groups, lr=rate, scale_parameter=False, relative_step=False, warmup_init=False)


def _bitsandbytes(name: str) -> Factory:
    def build(groups: list[dict[str, Any]], rate: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
        import bitsandbytes

        optimizer: torch.optim.Optimizer = getattr(bitsandbytes.optim, name)(groups, lr=rate, betas=betas)
        return optimizer

    return build


OPTIMIZERS: dict[str, Factory] = {
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,
    "paged_adamw_8bit": _bitsandbytes("PagedAdamW8bit"),
    "lion_8bit": _bitsandbytes("Lion8bit"),
    "adafactor": _adafactor,
    "sgd": _sgd,
}

SCHEDULES: dict[str, dict[str, Any]] = {
    # name in transformers: its own options
    "cosine": {},
    "linear": {},
    "constant": {},
    "inverse_sqrt": {},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
}


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    learning_rate: float,
    loraplus_lr_ratio: float | None = None,
    embedding_learning_rate: float | None = None,
) -> list[dict[str, Any]]:
    """The trained parameters by weight decay and learning rate; empty groups are left out.

    Matrices decay, the rest does not. A group whose rate is not `learning_rate` has it as `lr_ratio`, a multiple.

    Args:
        learning_rate: the peak of most parameters.
        loraplus_lr_ratio: rate of the B matrices of LoRA adapters over that of the others (LoRA+,
            https://arxiv.org/abs/2402.12354).
        embedding_learning_rate: peak of what trains of the embeddings and the head.
    """
    embedding_ratio = 1.0 if embedding_learning_rate is None else embedding_learning_rate / learning_rate
    embeddings = _embedding_parameters(model)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        ratio = loraplus_lr_ratio or 1.0 if ".lora_B." in name else 1.0
        ratio = embedding_ratio if id(parameter) in embeddings else ratio
        groups.setdefault((ratio, parameter.ndim >= 2), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0}
        | ({"lr_ratio": ratio} if ratio != 1.0 else {})
        for (ratio, decays), parameters in sorted(
            groups.items(), key=lambda item: (item[0][0], not item[0][1])
        )
    ]


def _embedding_parameters(model: Any) -> set[int]:
    """Identities of the parameters of embeddings and head, adapters excepted."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    modules = [getattr(base, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    return {
        id(parameter)
        for module in modules
        if module is not None
        for name, parameter in module.named_parameters()
        if "lora_" not in name
    }


def build_optimizer(
    name: str,
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    loraplus_lr_ratio: float | None = None,
    embedding_learning_rate: float | None = None,
) -> torch.optim.Optimizer:
    """The optimizer `name` over the parameters of `model` that require grad, see `parameter_groups`."""
    groups = parameter_groups(
        model,
        weight_decay,
        learning_rate=learning_rate,
        loraplus_lr_ratio=loraplus_lr_ratio,
        embedding_learning_rate=embedding_learning_rate,
    )
    return OPTIMIZERS[name](groups, learning_rate, betas)


class Schedule:
    """Learning rate as a function of the step.

    Args:
        name: a row of `SCHEDULES`.
        learning_rate: the peak.
        warmup: a fraction of `total_steps` below 1, a number of steps from 1 on.
        total_steps: optimizer steps of the run.
    """

    def __init__(self, name: str, *, learning_rate: float, warmup: float, total_steps: int) -> None:
        from transformers import get_scheduler

        self.learning_rate = learning_rate
        warmup_steps = round(warmup * total_steps) if warmup < 1 else round(warmup)
        constant = name == "constant"
        scheduler: Any = get_scheduler(
            "constant_with_warmup" if constant else name,
            torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=learning_rate),
            num_warmup_steps=warmup_steps,
            num_training_steps=total_steps,
            scheduler_specific_kwargs=SCHEDULES[name],
        )
        self._multiplier: Callable[[int], float] = scheduler.lr_lambdas[0]
        self._warmup_steps = warmup_steps

    def at(self, step: int) -> float:
        """Learning rate of the step with this number, the first being 0."""
        if step < self._warmup_steps:  # the first step already learns: 1/n, 2/n, … instead of 0, 1/n, …
            return self.learning_rate * (step + 1) / (self._warmup_steps + 1)
        return self.learning_rate * float(self._multiplier(step))

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set the learning rate of every group for this step and return that of most."""
        rate = self.at(step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("lr_ratio", 1.0)
        return rate
