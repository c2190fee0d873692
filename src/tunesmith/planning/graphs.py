"""Whether recording CUDA graphs pays for a model and a size of micro-batch. Torch-free.

A fused layer takes the host some 2.5 ms forward and backward (measured with 135M and 8B shapes on one H100: 1.4 to
2.6), whatever its size; the device takes 4 · P · T operations for P parameters and T tokens. Where the device is done
first it waits for the host, and a graph takes the host out. Where it is not, a graph gains nothing and its pool of
memory costs as much as the activations.
"""

from __future__ import annotations

HOST_SECONDS = 2.5e-3
"""Of a fused layer forward and backward."""

DEVICE_RATE = 4e14
"""Operations a second that a layer reaches on a large card, its small kernels included."""


def graphs_pay(*, tokens: int, layer_parameters: float) -> bool:
    """Whether the host is what a micro-batch waits for.

    Args:
        tokens: of a micro-batch.
        layer_parameters: of one decoder layer.
    """
    return 4.0 * layer_parameters * tokens / DEVICE_RATE < HOST_SECONDS
