"""AdamW with moments in 8 bits, over the tables of `FusedAdamW`: the optimizer of full fine-tuning on one card.

Weights and gradients in bfloat16 take 4 bytes a parameter, moments 2.03; with AdamW in float32 it is 16. The
arithmetic is in `kernels.adamw_8bit`, and on a CPU, or where the canary has switched the kernel off, its torch
reference computes on the same state with the same random words. Small tensors keep float32 moments: norm weights and
biases are few, and their values matter most.

Rejected: bitsandbytes' AdamW8bit, which rounds bfloat16 weights to the nearest, so that small steps are lost, and
whose second moment can underflow beside a first that does not. `optim` falls back to it for tensors that are not
plain.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunesmith.contracts.errors import UserError
from tunesmith.kernels.adamw import NAME as ADAMW
from tunesmith.kernels.adamw import Table, update_
from tunesmith.kernels.adamw_8bit import NAME, scales_of, step_8bit_reference_, update_8bit_
from tunesmith.training.fused_adamw import FusedAdamW

SMALL = 4096
"""Elements below which moments stay in float32."""

_CODES = ("exp_avg_code", "root_code")
_SCALES = ("exp_avg_scale", "root_scale")
_NAMES = {"step", "exp_avg", "exp_avg_sq", *_CODES, *_SCALES}


class FusedAdamW8bit(FusedAdamW):
    """`FusedAdamW` whose moments take a byte each.

    The state of a large parameter: `step`; `exp_avg_code` and `root_code`, uint8 of its shape; `exp_avg_scale` and
    `root_scale`, float32, one for each 256 elements. That of a small one is `FusedAdamW`'s.
    """

    kernels = (ADAMW, NAME)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, every tensor in its own type.

        Raises:
            UserError: it is another optimizer's.
        """
        found = {name for state in state_dict["state"].values() for name in state}
        if not found <= _NAMES:
            raise UserError(
                f"The optimizer state has {', '.join(sorted(found - _NAMES))}, which adamw_8bit does not: "
                f"another optimizer wrote it, such as bitsandbytes'.",
                hint="Start a new run from the weights, or go on with the version that wrote the checkpoint.",
            )
        super().load_state_dict(state_dict)

    def _rows_of(self, parameter: Tensor) -> tuple[Tensor, ...]:
        if parameter.numel() < SMALL:
            moments = super()._rows_of(parameter)
            return *moments, moments[2], moments[2]  # float32 moments have no scales, and nothing reads them
        state: dict[str, Tensor] = self.state[parameter]
        device = parameter.device
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            for name, zero in zip(_CODES, (127, 0), strict=True):
                state[name] = torch.full_like(parameter, zero, dtype=torch.uint8)
            for name in _SCALES:
                state[name] = torch.zeros(scales_of(parameter.numel()), device=device)
        for name in (*_CODES, *_SCALES):
            state[name] = state[name].to(device).contiguous()
        state["step"] = state["step"].to(device=device, dtype=torch.float32)
        return tuple(state[name] for name in (*_CODES, "step", *_SCALES))

    def _launch(
        self, tables: tuple[Table, ...], option_GR: Tensor, clip_2: Tensor, found_inf: Tensor
    ) -> None:
        in_8_bits = [table for table in tables if table.moment_dtype == torch.uint8]
        rest = [table for table in tables if table.moment_dtype != torch.uint8]
        update_8bit_(in_8_bits, option_GR, clip_2, found_inf, self.seed)
        update_(rest, option_GR, clip_2, found_inf, self.seed)

    def _is_referenced(self, parameters: list[Tensor]) -> bool:
        assert self._is_plain(), "there is no amsgrad, no maximize and no learning rate in a tensor"
        return bool(parameters)

    def _step_with_reference(
        self, parameters: list[Tensor], gradients: list[Tensor], clip: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        pairs = list(zip(parameters, gradients, strict=True))
        small = [pair for pair in pairs if pair[0].numel() < SMALL]
        large = [pair for pair in pairs if pair[0].numel() >= SMALL]
        if small:
            super()._step_with_reference([p for p, _ in small], [gradient for _, gradient in small], clip)
        if not large:
            return
        parameters, gradients = [p for p, _ in large], [gradient for _, gradient in large]
        groups, numbers = self._places(parameters)
        rows = [self._rows_of(parameter) for parameter in parameters]
        firsts, roots, steps, first_scales, root_scales = zip(*rows, strict=True)
        step_8bit_reference_(
            parameters, gradients, firsts, roots, first_scales, root_scales, steps, groups=groups,
            options=self._options(), factor=clip[1], apply=clip[2], seed=self.seed, numbers=numbers,
        )  # fmt: skip
