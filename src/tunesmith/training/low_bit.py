"""torchao's AdamW with moments in 8 bits, 4 bits or float8, with a state of plain tensors.

torchao holds a moment as a tensor subclass: codes, a float32 scale for each block of them, and a table of values that
follows from the name of the moment. A checkpoint gets codes and scales, which restore it bit for bit; stored as the
subclass it would need pickle, or code that makes any class a file names.

On a GPU torchao compiles its update with Triton. On a CPU it runs here as plain torch: the same arithmetic, without a
C++ compiler and without the seconds that compiling every shape takes. Weights in bfloat16 are rounded stochastically
from torch's own generator, whose state is in every checkpoint.

Moments of small tensors are not quantised. They are float32 here; torchao makes them in the type of the weights, and
in bfloat16 a moment cannot follow an average over a thousand steps.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from tunesmith.contracts.errors import UserError

_PARTS = ("codes", "scale")
FLOAT8 = (8, 9)
"""Compute capability from which Triton converts to float8 e4m3."""


class LowBit(torch.optim.Optimizer):
    """What `build` puts before one of torchao's optimizers: plain states, and plain torch on a CPU."""

    _subclass_zeros: Callable[[Tensor, bool, int], Any]
    block_size: int

    def _new_buffer(self, parameter: Tensor, signed: bool) -> Any:
        """A moment of zeros: quantised where it is large and whole blocks fill it, else float32."""
        if parameter.numel() >= 4096 and parameter.numel() % self.block_size == 0:
            return self._subclass_zeros(parameter, signed, self.block_size)
        return torch.zeros_like(parameter, dtype=torch.float32)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient."""
        on_cpu = self.param_groups[0]["params"][0].device.type == "cpu"
        with torch.compiler.set_stance("force_eager") if on_cpu else nullcontext():
            return super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        """The state with a dict of codes and scales in place of each quantised moment."""
        whole = super().state_dict()
        state = {
            number: {name: _plain(v) for name, v in kept.items()} for number, kept in whole["state"].items()
        }
        return {**whole, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, every tensor in its own type."""
        super().load_state_dict({**state_dict, "state": {}})
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            if number in state_dict["state"]:
                kept = state_dict["state"][number].items()
                self.state[parameter] = {name: self._restored(parameter, name, v) for name, v in kept}

    def _restored(self, parameter: Tensor, name: str, value: Any) -> Any:
        if name == "step":  # on the CPU, as torchao has it
            return value.clone()
        if isinstance(value, Tensor):
            return value.to(parameter.device, copy=True)
        moment = self._new_buffer(parameter, signed=name == "exp_avg")
        for part in _PARTS:
            getattr(moment, part).copy_(value[part])
        return moment


def _plain(value: Any) -> Any:
    if all(hasattr(value, part) for part in _PARTS):
        return {part: getattr(value, part) for part in _PARTS}
    return value


def build(
    name: str, groups: list[dict[str, Any]], rate: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """torchao's optimizer `name` over these groups, rounding bfloat16 weights stochastically.

    Raises:
        UserError: it does not run on this GPU.
    """
    import torchao.optim

    device = groups[0]["params"][0].device
    if name.endswith("Fp8") and device.type == "cuda" and torch.cuda.get_device_capability(device) < FLOAT8:
        raise UserError(
            f"train.optimizer: adamw_torch_fp8 needs a GPU that computes in float8, and the "
            f"{torch.cuda.get_device_name(device)} does not.",
            hint="Use adamw_8bit or adamw_torch_8bit.",
        )
    kind: Any = type(name, (LowBit, getattr(torchao.optim, name)), {})
    optimizer: torch.optim.Optimizer = kind(groups, lr=rate, betas=betas, bf16_stochastic_round=True)
    return optimizer
