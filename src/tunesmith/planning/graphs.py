"""Whether CUDA graphs may be recorded under the settings of a run, and whether they pay. Torch-free.

A fused layer takes the host some 2.5 ms forward and backward (measured with 135M and 8B shapes on one H100: 1.4 to
2.6), whatever its size. For P parameters and T tokens the device takes 2 · P · T operations forward and as many for
the gradient of the layer's input, and 2 · P · T more for that of its weights where these train. Where the device is
done first it waits for the host, and a graph takes the host out. Where it is not, a graph gains nothing and its pool
of memory costs as much as the activations.
"""

from __future__ import annotations

HOST_SECONDS = 2.5e-3
"""Of a fused layer forward and backward."""

DEVICE_RATE = 4e14
"""Operations a second that a layer reaches on a large card, its small kernels included."""


def graphs_refusal(
    wanted: str, *, gpu: bool, loss_scale: bool, neftune: bool, deterministic: bool
) -> str | None:
    """Why no graphs are recorded, as far as settings and the device tell; None where they leave it open.

    Args:
        wanted: `train.cuda_graphs`.
        gpu: whether fused layers run on one.
        loss_scale: whether the loss is scaled, as it is in float16.
        neftune: whether there is noise on the embeddings.
        deterministic: `train.deterministic`.
    """
    if wanted == "never":
        return "train.cuda_graphs is never"
    if not gpu:
        return "there is no GPU"
    if loss_scale:
        return "float16 trains with a loss scale"
    if neftune:
        return "NEFTune scales its noise on the host, by the lengths of the documents"
    if deterministic:
        return (
            "train.deterministic is on, and a run that goes on would record at other steps than one that never "
            "stopped"
        )
    return None


def graphs_pay(*, tokens: int, layer_parameters: float, full: bool) -> bool:
    """Whether the host is what a micro-batch waits for.

    Args:
        tokens: of a micro-batch.
        layer_parameters: of one decoder layer.
        full: whether its own weights train; an adapter's are too few to count.
    """
    products = 3 if full else 2
    return 2.0 * products * layer_parameters * tokens / DEVICE_RATE < HOST_SECONDS
