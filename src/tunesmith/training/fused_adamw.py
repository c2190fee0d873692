"""`torch.optim.AdamW` that clips and steps in four launches, whatever the number of parameters.

torch's fused AdamW with `get_total_norm` and `clip_grads_with_norm_` takes some 80 launches and 3 to 5 ms of Python
for the 420 tensors of a LoRA run, as long as the forward pass of a small model. Here the work is in
`kernels.adamw`; this class keeps its tables of addresses up to date. State and options of float32 parameters are
those of `torch.optim.AdamW(fused=True)`, so that either loads the checkpoints of the other.

Parameters in bfloat16 have float32 moments and are rounded stochastically (`kernels.stochastic`): torch's have
moments in bfloat16, which cannot follow an average over a thousand steps, and lose every step that is below half a
unit in the last place.

Where the kernel does not compute (no GPU, the canary has switched it off, a parameter was moved or cast), torch's own
code does, on the same state; for bfloat16 the kernel's reference.
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
    clip_reference,
    make_tables,
    option_table,
    point_at,
    staged,
    step_reference_,
    update_,
)

DTYPES = (torch.float32, torch.bfloat16)
"""Types that are computed here; float16 needs a loss scale and is left to torch."""


def plain(parameters: Iterable[Tensor]) -> bool:
    """Whether these are plain, contiguous, float32 or bfloat16, and on one device: the references compute them."""
    parameters = list(parameters)
    return len({parameter.device for parameter in parameters}) == 1 and all(
        type(parameter) in (Tensor, nn.Parameter)  # neither distributed nor quantised
        and parameter.dtype in DTYPES
        and parameter.is_contiguous()
        for parameter in parameters
    )


def fits(parameters: Iterable[Tensor], names: Iterable[str] = (NAME,)) -> bool:
    """Whether the kernels `names` can update these: plain, and the device has Triton."""
    parameters = list(parameters)
    return plain(parameters) and all(launch.use_triton(p, name) for p in parameters for name in names)


def rounds(parameters: Iterable[Tensor]) -> bool:
    """Whether any of these has to be rounded stochastically."""
    return any(parameter.dtype == torch.bfloat16 for parameter in parameters)


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
        seed: of stochastic rounding. It is no part of the state: a run that goes on has the same.
    """

    kernels: tuple[str, ...] = (NAME,)
    """Rows of the catalog that make a step."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        seed: int = 0,
    ) -> None:
        self.seed = seed
        self._forget()
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)

    def _forget(self) -> None:
        """Drop what was derived from parameters and state."""
        self._plan: _Plan | None = None
        self._measured: tuple[list[Tensor], Tensor] | None = None
        self._limit: float | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a state, also one that torch's AdamW has kept with its step counts on the CPU."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._forget()
        for group in self.param_groups:
            group["fused"] = True
            for parameter in group["params"]:
                if "step" in (kept := self.state.get(parameter, {})):
                    kept["step"] = kept["step"].to(device=parameter.device, dtype=torch.float32)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, every tensor in its own type: torch's gives it that of its parameter."""
        super().load_state_dict({**state_dict, "state": {}})
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, parameter in zip(numbers, self._all(), strict=True):
            if number in state_dict["state"]:
                kept = state_dict["state"][number].items()
                self.state[parameter] = {name: value.to(parameter.device, copy=True) for name, value in kept}
        self.__setstate__({"state": self.state, "param_groups": self.param_groups})

    def _all(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does."""
        self._forget()
        super().add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and forget a clipping that no step has used."""
        self._measured = self._limit = None
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def clip_in_step(self, max_norm: float | None) -> Tensor:
        """Have the next step clip the global gradient norm to `max_norm`; None measures only.

        The gradients that are measured are the ones that step reads; `zero_grad` cancels both. The step is skipped
        where the norm is not finite. Where torch computes in place of the kernel, it clips the gradients themselves.

        Returns:
            The norm before clipping, a scalar on the device; nothing waits for it.
        """
        gradients = self.refresh()
        if gradients is None:
            parameters, gradients = self._with_gradients()
            if not self._is_referenced(parameters):
                return self._clip_with_torch(max_norm)
            self._limit = max_norm
            return clip_reference(gradients, torch.float32, max_norm, None)[0]
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
                self._step_without_kernel(scale)
            else:
                self._update(measured[1] if measured is not None else None)
        return loss

    def _step_without_kernel(self, scale: Tensor | None) -> None:
        parameters, gradients = self._with_gradients()
        if not self._is_referenced(parameters):
            super().step()
            return
        if scale is not None:
            gradients = [gradient / scale for gradient in gradients]
        limit, self._limit = self._limit, None
        clip = clip_reference(gradients, torch.float32, limit, getattr(self, "found_inf", None))
        self._step_with_reference(parameters, gradients, clip)

    def _is_referenced(self, parameters: list[Tensor]) -> bool:
        """Whether the kernel's reference computes where the kernel does not, and not torch."""
        return self._is_plain() and rounds(parameters)

    def _step_with_reference(
        self, parameters: list[Tensor], gradients: list[Tensor], clip: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        """A step of these from what `clip_reference` found of all gradients."""
        rows = [self._rows_of(parameter) for parameter in parameters]
        groups, numbers = self._places(parameters)
        firsts, seconds, steps, *_ = zip(*rows, strict=True)
        step_reference_(
            parameters, gradients, firsts, seconds, steps, groups=groups, options=self._options(),
            factor=clip[1], apply=clip[2], seed=self.seed, numbers=numbers,
        )  # fmt: skip

    def _update(self, clip_2: Tensor | None) -> None:
        plan = self._plan
        assert plan is not None
        self._refresh_options(plan)  # it may have changed since the gradients were measured
        found_inf = getattr(self, "found_inf", None)
        self._launch(
            plan.tables,
            plan.option_GR,
            plan.clip_2 if clip_2 is None else clip_2,
            plan.found_inf if found_inf is None else found_inf,
        )
        # the kernels write past autograd, which has to know that what it has saved is no longer there
        torch.autograd.graph.increment_version(plan.parameters)

    def _launch(
        self, tables: tuple[Table, ...], option_GR: Tensor, clip_2: Tensor, found_inf: Tensor
    ) -> None:
        update_(tables, option_GR, clip_2, found_inf, self.seed)

    def refresh(self) -> list[Tensor] | None:
        """Bring the tables on the device up to date with parameters, gradients, learning rates; copies what changed.

        `clip_in_step` and `step` do it themselves. It has to be called before a CUDA graph with their launches is
        replayed, for the learning rate.

        Returns:
            The gradients as the kernels read them, or None where torch has to compute.
        """
        parameters, gradients = self._with_gradients()
        if launch.switched_off.intersection(self.kernels) or not self._is_plain():
            self._plan = None
        elif self._plan is None or not self._plan.holds(parameters):
            self._plan = self._make_plan(parameters) if fits(parameters, self.kernels) else None
        if self._plan is None:
            return None
        point_at(self._plan.tables, gradients)
        self._refresh_options(self._plan)
        return gradients

    def _with_gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """Parameters that have a gradient, and it as the kernels read it."""
        pairs = [(p, _like(gradient, p)) for p in self._all() if (gradient := p.grad) is not None]
        return [parameter for parameter, _ in pairs], [gradient for _, gradient in pairs]

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

    def _places(self, parameters: list[Tensor]) -> tuple[list[int], list[int]]:
        """Group and number of each of these parameters; a number is the same whichever others have gradients."""
        group_of = {p: index for index, group in enumerate(self.param_groups) for p in group["params"]}
        number_of = {parameter: number for number, parameter in enumerate(self._all())}
        return [group_of[p] for p in parameters], [number_of[p] for p in parameters]

    def _make_plan(self, parameters: list[Tensor]) -> _Plan:
        device = parameters[0].device
        groups, numbers = self._places(parameters)
        rows = [self._rows_of(parameter) for parameter in parameters]
        firsts, seconds, steps, *scales = zip(*rows, strict=True)
        options = self._options()
        return _Plan(
            parameters=parameters,
            places=[parameter.data_ptr() for parameter in parameters],
            states=[tensor for row in rows for tensor in row],
            tables=make_tables(parameters, firsts, seconds, steps, groups, numbers=numbers, scales=scales),
            options=options,
            option_GR=option_table(options, device).to(device, non_blocking=True),
            clip_2=staged([0.0, 1.0], torch.float32, device).to(device, non_blocking=True),
            found_inf=torch.zeros(1, device=device),
        )

    def _rows_of(self, parameter: Tensor) -> tuple[Tensor, ...]:
        """The state of a parameter as the tables have it: moments, step count, and what else a kernel needs.

        It is made as torch makes it, but for the moments of bfloat16, or loaded and laid out like the parameter.
        """
        state: dict[str, Tensor] = self.state[parameter]
        wide = torch.promote_types(parameter.dtype, torch.float32)
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=wide)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=wide)
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = state[name].to(parameter.device, wide).contiguous()
        state["step"] = state["step"].to(device=parameter.device, dtype=torch.float32)
        return state["exp_avg"], state["exp_avg_sq"], state["step"]


def _like(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient in the type of its parameter and contiguous; a copy only where it is not."""
    if gradient.dtype != parameter.dtype:
        gradient = gradient.to(parameter.dtype)
    return gradient if gradient.is_contiguous() else gradient.contiguous()
