"""The tables of optimizers and learning-rate schedules.

A schedule is used as a pure function of the step number: nothing of it needs saving, and a skipped step does not
shift it. Optimizers of other packages are imported where they are built, so that a run needs those it uses.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.contracts.errors import UserError
from tunesmith.training import low_bit, schedule_free
from tunesmith.training.fused_adamw import FusedAdamW, fits, plain, rounds
from tunesmith.training.fused_adamw_8bit import FusedAdamW8bit
from tunesmith.training.groups import Pattern, parameter_groups
from tunesmith.training.muon import MuonWithAdamW, hidden_matrices

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


def _muon(groups: list[dict[str, Any]], rate: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    return MuonWithAdamW(groups, rate, partial(_adamw, rate=rate, betas=betas))


def _bitsandbytes(name: str, *more_betas: float) -> Factory:
    def build(groups: list[dict[str, Any]], rate: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
        import bitsandbytes

        kind = getattr(bitsandbytes.optim, name)
        optimizer: torch.optim.Optimizer = kind(groups, lr=rate, betas=(*betas, *more_betas))
        return optimizer

    return build


OPTIMIZERS: dict[str, Factory] = {
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,
    "paged_adamw_32bit": _bitsandbytes("PagedAdamW"),
    "paged_adamw_8bit": _bitsandbytes("PagedAdamW8bit"),
    "adamw_torch_8bit": partial(low_bit.build, "AdamW8bit"),
    "adamw_torch_4bit": partial(low_bit.build, "AdamW4bit"),
    "adamw_torch_fp8": partial(low_bit.build, "AdamWFp8"),
    "schedule_free_adamw": schedule_free.build,
    "muon": _muon,
    "lion_32bit": _bitsandbytes("Lion"),
    "lion_8bit": _bitsandbytes("Lion8bit"),
    "ademamix": _bitsandbytes("AdEMAMix", 0.9999),
    "ademamix_8bit": _bitsandbytes("AdEMAMix8bit", 0.9999),
    "adafactor": _adafactor,
    "sgd": _sgd,
}

PACKAGES = {
    "adamw_torch_8bit": "torchao",
    "adamw_torch_4bit": "torchao",
    "adamw_torch_fp8": "torchao",
    "schedule_free_adamw": "schedulefree",
}
"""Packages that are an extra, `optimizers`, by the optimizers that need them."""

SCHEDULES: dict[str, dict[str, Any]] = {
    # name in transformers: its own options
    "cosine": {},
    "linear": {},
    "constant": {},
    "inverse_sqrt": {},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
}


def check_installed(name: str) -> None:
    """Notice before a run begins that the package of an optimizer is missing.

    Raises:
        UserError: it is.
    """
    package = PACKAGES.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        raise UserError(
            f"train.optimizer: {name} is of the package {package}, which is not installed.",
            hint='Install it with `pip install "tunesmith[optimizers]"`, or use adamw or adamw_8bit.',
        )


def build_optimizer(
    name: str,
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    loraplus_lr_ratio: float | None = None,
    embedding_learning_rate: float | None = None,
    patterns: Sequence[Pattern] = (),
) -> torch.optim.Optimizer:
    """The optimizer `name` over the parameters of `model` that require grad, see `parameter_groups`.

    Raises:
        UserError: a pattern matches nothing that trains, or this optimizer cannot train this model here.
    """
    check_installed(name)
    groups = parameter_groups(
        model,
        weight_decay,
        learning_rate=learning_rate,
        loraplus_lr_ratio=loraplus_lr_ratio,
        embedding_learning_rate=embedding_learning_rate,
        patterns=patterns,
        apart=hidden_matrices(model) if name == "muon" else (),
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
            own = rate * group.get("lr_ratio", 1.0)
            if isinstance(group["lr"], Tensor):  # compiled code reads it anew at each step
                group["lr"].fill_(own)
            else:
                group["lr"] = own
        return rate
