"""`torch.optim.AdamW` that clips and steps in four launches, whatever the number of parameters.

torch's fused AdamW with `get_total_norm` and `clip_grads_with_norm_` takes some 80 launches and 3 to 5 ms of Python
for the 420 tensors of a LoRA run, as long as the forward pass of a small model. Here the work is in
`kernels.adamw`; this class keeps its tables of addresses up to date. State and options are those of
`torch.optim.AdamW(fused=True)`, so that either loads the checkpoints of the other.

Where the kernel does not compute (the canary has switched it off, a parameter was moved or cast), torch's own code
does, on the same state.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.kernels import launch
from tunesmith.kernels.adamw import (
    NAME,
    Options,
    Table,
    clip_factor,
    make_tables,
    option_table,
    point_at,
    staged,
    update_,
)

DTYPES = (torch.float32, torch.bfloat16)
"""Types that are computed here; float16 needs a loss scale and is left to torch."""


def fits(parameters: Iterable[Tensor]) -> bool:
    """Whether the kernel can update these: plain, contiguous, float32 or bfloat16, on one device that has Triton."""
    parameters = list(parameters)
    return len({parameter.device for parameter in parameters}) == 1 and all(
        type(parameter) in (Tensor, nn.Parameter)  # neither distributed nor quantised
        and parameter.dtype in DTYPES
        and parameter.is_contiguous()
        and launch.use_triton(parameter, NAME)
        for parameter in parameters
    )


@dataclass(slots=True)
class _Plan:
    """What the kernels need, for as long as the same parameters have gradients.

    `states` keeps alive what the tables hold addresses of. `clip_2` and `found_inf` are what the update reads
    where nothing was clipped and nothing can be skipped.
    """

    parameters: list[Tensor]
    places: list[int]
    states: list[Tensor]
    tables: tuple[Table, ...]
    options: list[Options]
    option_GR: Tensor
    clip_2: Tensor
    found_inf: Tensor

    def holds(self, parameters: list[Tensor]) -> bool:
        """Whether it was made for these, and they lie where they lay."""
        return (
            len(parameters) == len(self.parameters)
            and all(map(operator.is_, parameters, self.parameters))
            and [parameter.data_ptr() for parameter in parameters] == self.places
        )


class FusedAdamW(torch.optim.AdamW):
    """AdamW of decoupled weight decay, with clipping as part of the step.

    `clip_in_step` measures the gradients and leaves them as they are; the step after it multiplies them with the
    clipping factor. `found_inf` has torch's meaning: a float32 scalar on the device that, if it is not 0, skips
    the step there.

    Args:
        params: parameters or groups, as torch takes them.
        lr: learning rate.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: of the groups that name none.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        self._forget()
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)

    def _forget(self) -> None:
        """Drop what was derived from parameters and state."""
        self._plan: _Plan | None = None
        self._measured: tuple[list[Tensor], Tensor] | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a state, also one that torch's AdamW has kept with its step counts on the CPU."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._forget()
        for group in self.param_groups:
            group["fused"] = True
            for parameter in group["params"]:
                if "step" in (kept := self.state.get(parameter, {})):
                    kept["step"] = kept["step"].to(device=parameter.device, dtype=torch.float32)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does."""
        self._forget()
        super().add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and forget a clipping that no step has used."""
        self._measured = None
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def clip_in_step(self, max_norm: float | None) -> Tensor:
        """Have the next step clip the global gradient norm to `max_norm`; None measures only.

        The gradients that are measured are the ones that step reads; `zero_grad` cancels both. The step is skipped
        where the norm is not finite. Without the kernel, torch clips the gradients themselves.

        Returns:
            The norm before clipping, a scalar on the device; nothing waits for it.
        """
        gradients = self.refresh()
        if gradients is None:
            return self._clip_with_torch(max_norm)
        assert self._plan is not None
        clip_2 = clip_factor(self._plan.tables, max_norm)
        self._measured = (gradients, clip_2)
        return clip_2[0]

    def _clip_with_torch(self, max_norm: float | None) -> Tensor:
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not parameters:
            return torch.zeros((), device=self.param_groups[0]["params"][0].device)
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        if max_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        measured, self._measured = self._measured, None
        with torch.no_grad():
            gradients = self.refresh() if measured is None else measured[0]
            scale = getattr(self, "grad_scale", None)
            assert measured is None or scale is None, "gradients are unscaled before they are measured"
            if gradients is None or scale is not None:
                super().step()
            else:
                self._update(measured[1] if measured is not None else None)
        return loss

    def _update(self, clip_2: Tensor | None) -> None:
        plan = self._plan
        assert plan is not None
        self._refresh_options(plan)  # it may have changed since the gradients were measured
        found_inf = getattr(self, "found_inf", None)
        update_(
            plan.tables,
            plan.option_GR,
            plan.clip_2 if clip_2 is None else clip_2,
            plan.found_inf if found_inf is None else found_inf,
        )
        # the kernels write past autograd, which has to know that what it has saved is no longer there
        torch.autograd.graph.increment_version(plan.parameters)

    def refresh(self) -> list[Tensor] | None:
        """Bring the tables on the device up to date with parameters, gradients, learning rates; copies what changed.

        `clip_in_step` and `step` do it themselves. It has to be called before a CUDA graph with their launches is
        replayed, for the learning rate.

        Returns:
            The gradients as the kernels read them, or None where torch has to compute.
        """
        pairs = [
            (parameter, gradient)
            for group in self.param_groups
            for parameter in group["params"]
            if (gradient := parameter.grad) is not None
        ]
        parameters = [parameter for parameter, _ in pairs]
        if NAME in launch.switched_off or not self._is_plain():
            self._plan = None
        elif self._plan is None or not self._plan.holds(parameters):
            self._plan = self._make_plan(parameters) if fits(parameters) else None
        if self._plan is None:
            return None
        gradients = [_like(gradient, parameter) for parameter, gradient in pairs]
        point_at(self._plan.tables, gradients)
        self._refresh_options(self._plan)
        return gradients

    def _refresh_options(self, plan: _Plan) -> None:
        options = self._options()
        if options != plan.options:
            plan.option_GR.copy_(option_table(options, plan.option_GR.device), non_blocking=True)
            plan.options = options

    def _is_plain(self) -> bool:
        """Whether the groups ask for nothing but what the kernel does."""
        return not any(
            group["amsgrad"] or group["maximize"] or isinstance(group["lr"], Tensor)
            for group in self.param_groups
        )

    def _options(self) -> list[Options]:
        return [
            (group["lr"], *map(float, group["betas"]), group["eps"], group["weight_decay"])
            for group in self.param_groups
        ]

    def _make_plan(self, parameters: list[Tensor]) -> _Plan:
        device = parameters[0].device
        group_of = {p: index for index, group in enumerate(self.param_groups) for p in group["params"]}
        states = [self._state_of(parameter) for parameter in parameters]
        firsts, seconds, steps = (
            [state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")
        )
        options = self._options()
        return _Plan(
            parameters=parameters,
            places=[parameter.data_ptr() for parameter in parameters],
            states=firsts + seconds + steps,
            tables=make_tables(
                parameters, firsts, seconds, steps, [group_of[parameter] for parameter in parameters]
            ),
            options=options,
            option_GR=option_table(options, device).to(device, non_blocking=True),
            clip_2=staged([0.0, 1.0], torch.float32, device).to(device, non_blocking=True),
            found_inf=torch.zeros(1, device=device),
        )

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of a parameter, made as torch makes it, or loaded and laid out like the parameter."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = state[name].to(parameter).contiguous()
        state["step"] = state["step"].to(device=parameter.device, dtype=torch.float32)
        return state


def _like(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient in the type of its parameter and contiguous; a copy only where it is not."""
    if gradient.dtype != parameter.dtype:
        gradient = gradient.to(parameter.dtype)
    return gradient if gradient.is_contiguous() else gradient.contiguous()
