"""What one micro-batch adds to the gradients, as a squared norm and without a second copy of them.

A gradient reaches a parameter through autograd before it is added to `.grad`; a hook there sees it alone and takes
its norm, which costs one number. Autograd sums what comes from several uses of a parameter before it calls the hook,
so tied embeddings count once. Rejected: norms of the running sum, because ‖s + c‖² − ‖s‖² = ‖c‖² + 2⟨s, c⟩ and the
second term needs c, too.

A recorded CUDA graph calls no hooks. Graphs are for models whose gradients fit several times over, and there the sum
as it was before is copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def squared_norm(gradient: Tensor) -> Tensor:
    """‖g‖² as a float64 scalar on the device, summed in float32 or wider."""
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(gradient, dtype=dtype)
    return norm.double().square()


@contextmanager
def added_square(parameters: Sequence[nn.Parameter], squares: list[Tensor]) -> Iterator[None]:
    """Append to `squares` the squared norm of what backward adds to the gradients of `parameters` in the block."""
    total = torch.zeros((), dtype=torch.float64, device=parameters[0].device)

    def see(gradient: Tensor) -> None:
        total.add_(squared_norm(gradient.detach()))

    handles = [parameter.register_hook(see) for parameter in parameters]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    squares.append(total)


@contextmanager
def changed_square(parameters: Sequence[nn.Parameter], squares: list[Tensor]) -> Iterator[None]:
    """The same from a copy of the gradients before the block, for what no hook sees."""
    before = {parameter: parameter.grad.clone() for parameter in parameters if parameter.grad is not None}
    yield
    total = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
    for parameter in parameters:
        if parameter.grad is not None:
            earlier = before.get(parameter)
            total.add_(squared_norm(parameter.grad if earlier is None else parameter.grad - earlier))
    squares.append(total)
