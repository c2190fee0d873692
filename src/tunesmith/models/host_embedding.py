"""The input embedding in pinned host memory: a frozen table of which a micro-batch reads a few thousand rows.

Of a 70B model it takes 1.96 GiB of the GPU in bfloat16. On the host it stays the weight of the same module, under the
same name in state dicts, and the module's forward reads the rows of its ids over the link (`kernels.gather_rows`).

The weight becomes a buffer for as long as it is there. As a parameter it would be the first of the model, and by the
device of the first parameter everybody tells where a model computes: transformers' `model.device`, where generation
moves its inputs, PEFT, trainers. A buffer is in state dicts under its name like a parameter, and what is frozen needs
nothing that parameters have. Rejected: a model class of our own that answers `device` differently, which would not
reach those who ask the parameters.

Shape suffixes: V rows of the table, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.kernels import launch
from tunesmith.kernels.gather_rows import gather_rows_op
from tunesmith.models.base_of import base_of
from tunesmith.models.host_memory import pinned_copy
from tunesmith.models.override import override


class NotMovableError(Exception):
    """The input embedding has to stay where it is; the text is the reason, a sentence without its full stop."""


@dataclass(frozen=True)
class HostEmbedding:
    """An input embedding whose weight is on the host.

    Attributes:
        module: the embedding.
        device: where the weight was.
        bytes: of the weight: that much pinned host memory is taken, and that much of the device is free.
        elements: of the weight, which the model's parameters do not count meanwhile.
    """

    module: nn.Embedding
    device: torch.device
    bytes: int
    elements: int
    _parameter: nn.Parameter = field(repr=False)
    _undo: list[Callable[[], None]] = field(repr=False)

    def undo(self) -> None:
        """Put the weight back on its device, as the parameter that it was, bit for bit; a second call does nothing.

        Raises:
            torch.OutOfMemoryError: the device has no room for it; it stays on the host then.
        """
        if not self._undo:
            return
        self._parameter.data = self.module.weight.detach().to(self.device)
        del self.module.weight
        self.module.register_parameter("weight", self._parameter)
        while self._undo:
            self._undo.pop()()


def move_embedding_to_host(model: Any) -> HostEmbedding:
    """Move the weight of a model's input embedding to pinned host memory, in place and reversibly.

    It pins `V · D` elements for as long as they are there, and each micro-batch then reads its tokens' rows of `D`
    elements over the link, once in forward and not at all in backward. CUDA graphs that were recorded before hold the
    old address, so it is moved before the first of them, or they are recorded again. `model.to(device)` takes the
    weight along to that device, where it is read as before.

    Args:
        model: a causal model of transformers, with or without a PEFT adapter.

    Raises:
        NotMovableError: `reason_to_stay` has one.
        NoHostMemoryError: the host has no such memory left to pin; the model is as it was.
    """
    reason = reason_to_stay(model)
    if reason is not None:
        raise NotMovableError(reason)
    module: nn.Embedding = base_of(model).get_input_embeddings()
    parameter: Any = module.weight
    device = parameter.device
    table_VD = pinned_copy(parameter.detach())
    moved = HostEmbedding(module, device, table_VD.nbytes, table_VD.numel(), parameter, [])
    parameter.data = table_VD  # the same parameter comes back, and holds nothing of the device until then
    del module.weight
    module.register_buffer("weight", table_VD)
    override(module, "forward", _forward, moved._undo)
    return moved


def _forward(module: nn.Embedding, input: Tensor) -> Tensor:  # noqa: A002 - the name that callers may use
    rows_ND: Tensor = gather_rows_op(module.weight, input.flatten().long())
    return rows_ND.view(*input.shape, module.embedding_dim)


def reason_to_stay(model: Any) -> str | None:
    """Why the input embedding of a model cannot be on the host, or None where it can.

    Hooks on it stay and run: they see ids and rows as before.
    """
    base = base_of(model)
    module: Any = base.get_input_embeddings()
    return _reason_of_module(module) or _reason_of_weight(module.weight) or _reason_of_ties(base, module)


def _reason_of_module(module: Any) -> str | None:
    if hasattr(module, "token_adapter"):
        return "rows of the input embedding train"
    if hasattr(module, "modules_to_save"):
        return "the input embedding trains beside the adapter"
    if hasattr(module, "base_layer"):
        return "an adapter sits on the input embedding"
    if getattr(type(module), "forward", None) is not nn.Embedding.forward:
        return f"the input embedding is a {type(module).__name__}, which computes more than rows of a table"
    if "forward" in vars(module):
        return "something else computes the input embedding already"
    if module.max_norm is not None:
        return "the input embedding changes the rows that it reads (max_norm)"
    return None


def _reason_of_weight(weight: Tensor) -> str | None:
    if type(weight) is not nn.Parameter:
        return f"the weight of the input embedding is a {type(weight).__name__}"
    if weight.requires_grad:
        return "the input embedding trains"
    if weight.device.type not in ("cuda", "cpu"):
        return f"the input embedding is on the device {weight.device}"
    if weight.numel() == 0:
        return "the weight of the input embedding is not gathered"
    if weight.is_cuda and weight.dtype not in launch.KERNEL_DTYPES:
        return f"no kernel reads an input embedding in {weight.dtype}".replace("torch.", "")
    if weight.is_cuda and (not launch.HAS_TRITON or "gather_rows" in launch.switched_off):
        return "the kernel that reads its rows does not work here"
    return None


def _reason_of_ties(base: nn.Module, module: nn.Embedding) -> str | None:
    storage = module.weight.untyped_storage().data_ptr()
    for path, owner in base.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if owner is not module and parameter.untyped_storage().data_ptr() == storage:
                return f"the input embedding shares its memory with {path}.{name}, as tied weights do"
    return None
