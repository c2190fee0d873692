"""What gradients say about the size of a batch, and where in the model they are large.

The simple noise scale of https://arxiv.org/abs/1812.06162 is B = tr Σ / |G|²: G is the gradient of the whole data, Σ
the covariance of that of one token. A batch far below B mostly averages noise, so that twice the batch does the work
of two steps; far above B it is wasted. Two batch sizes are needed to tell noise from gradient, and a step has them:
its micro-batches and itself.

Micro-batch i has n_i supervised tokens of the N of the step and adds w_i g_i to the gradient, with w_i = n_i / N and
g_i the mean over its own tokens. With independent tokens E|g_i|² = |G|² + tr Σ / n_i, so

    A = Σ |w_i g_i|²     E A = q |G|² + tr Σ / N     q = Σ w_i²
    C = |Σ w_i g_i|²     E C =   |G|² + tr Σ / N

and both estimates are unbiased whatever the sizes of the micro-batches:

    |G|² = (C − A) / (1 − q)          tr Σ = N (A − q C) / (1 − q)

For m micro-batches of one size this is the paper's pair with B_small = N / m and B_big = N. Tokens of one document
are not independent; tr Σ is then that of as many independent tokens as would be as noisy, which is what a batch of
such documents is made of. One step says little, and a ratio of unbiased numbers is biased: the two are averaged over
steps before they are divided.

Rejected: a second pass with another grouping of the rows, which would cost time and change the rounding of the step.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tunesmith.contracts.events import Event, Measured, Warned
from tunesmith.distributed.backend import Backend, Gradients

_MEMORY = 0.95
"""What stays of the averages at each measurement: about the last 20 count."""

LAYER = "grad_norm/"
"""Before the name of a layer in the values of an event."""


class Wanted(NamedTuple):
    """What is measured in a step."""

    noise: bool = False
    layers: bool = False


NOTHING = Wanted()


class Squares(NamedTuple):
    """What was measured of a step's gradients before clipping, on the host.

    Attributes:
        parts: squared norm of what each micro-batch added; none where the noise was not asked for.
        by_name: squared norm of each parameter's gradient.
    """

    parts: tuple[float, ...]
    by_name: dict[str, float]

    @property
    def whole(self) -> float:
        """Squared norm of the step's gradient."""
        return math.fsum(self.by_name.values())


class Unread(NamedTuple):
    """The same still on the device, so that a step does not wait for it before its update.

    Attributes:
        names: the trained parameters, in the order of the last values.
        values: float64 `[micro-batches that were measured + parameters]`.
    """

    names: tuple[str, ...]
    values: Tensor

    def read(self) -> Squares:
        """Fetch the values; the host waits for the device."""
        values = self.values.tolist()
        count = len(values) - len(self.names)
        return Squares(tuple(values[:count]), dict(zip(self.names, values[count:], strict=True)))


def squares_of(backend: Backend, gradients: Gradients) -> Unread:
    """Measure the gradients of a step, before the update takes them; nothing is read from the device."""
    by_name = backend.gradient_squares()
    parts = [] if gradients.squares is None else [gradients.squares]
    return Unread(tuple(by_name), torch.cat([*parts, torch.stack(list(by_name.values()))]))


class Estimate(NamedTuple):
    """Unbiased, so each may be negative.

    Attributes:
        gradient: |G|², the squared norm of the gradient without noise.
        noise: tr Σ, the summed variance of the gradient of one token.
    """

    gradient: float
    noise: float


def estimate(parts: Sequence[float], counts: Sequence[float], whole: float) -> Estimate | None:
    """The estimates of one step; None with fewer than two micro-batches that have supervised tokens.

    Args:
        parts: squared norm of what each micro-batch added to the gradient, A above when summed.
        counts: supervised tokens (or their weights) of each.
        whole: squared norm of the step's gradient, C above.
    """
    total = math.fsum(counts)
    share = math.fsum((count / total) ** 2 for count in counts)
    if sum(count > 0 for count in counts) < 2:
        return None
    added = math.fsum(parts)
    return Estimate((whole - added) / (1 - share), total * (added - share * whole) / (1 - share))


_NUMBERED = re.compile(r"(?:^|\.)(\w+)\.(\d+)\.")
_OF_PEFT = re.compile(
    r"\.(lora_\w+|modules_to_save|original_module|default|base_layer|token_adapter|trainable_tokens_\w+)(?=\.|$)"
)


def layer_of(parameter: str) -> str:
    """The layer that a parameter belongs to: `layers.7`, or what holds it, such as `embed_tokens`."""
    numbered = _NUMBERED.search(parameter)
    if numbered is not None:
        return f"{numbered[1]}.{numbered[2]}"
    module = _OF_PEFT.sub("", parameter).removesuffix(".weight").removesuffix(".bias")
    return module.rsplit(".", 1)[-1]


def layer_norms(by_name: Mapping[str, float]) -> dict[str, float]:
    """Gradient norm of each layer from the squared norms of parameters, in the order of the model."""
    squares: dict[str, float] = {}
    for name, square in by_name.items():
        layer = layer_of(name)
        squares[layer] = squares.get(layer, 0.0) + square
    return {layer: math.sqrt(square) for layer, square in squares.items()}


@dataclass
class Gauges:
    """Decides what is measured in which step, keeps the averages of the noise scale, and makes events of both.

    The averages start anew where a run goes on.

    Args:
        noise_every: steps between measurements of the noise scale; None never.
        layers_every: the same for the gradient norms of layers.
    """

    noise_every: int | None = None
    layers_every: int | None = None
    _gradient: float = 0.0
    _noise: float = 0.0
    _told: bool = False

    def wanted(self, step: int) -> Wanted:
        """What is measured in a step, counted from 1."""
        return Wanted(_due(step, self.noise_every), _due(step, self.layers_every))

    def events(self, step: int, wanted: Wanted, squares: Squares, counts: Sequence[float]) -> Iterator[Event]:
        """What to say of a step; nothing where its gradients are not finite.

        Args:
            counts: supervised tokens of each micro-batch.
        """
        if not math.isfinite(squares.whole):
            return
        values: dict[str, float] = {}
        if wanted.noise:
            found = estimate(squares.parts, counts, squares.whole)
            if found is not None:
                values |= self._values(found, math.fsum(counts))
            elif not self._told:
                self._told = True
                yield Warned(step=step, message=_ONE_MICRO_BATCH)
        if wanted.layers:
            values |= {f"{LAYER}{name}": norm for name, norm in layer_norms(squares.by_name).items()}
        if values:
            yield Measured(step=step, values=values)

    def _values(self, found: Estimate, tokens: float) -> dict[str, float]:
        # both begin at 0, and the share that is missing from both falls out of their ratio
        self._gradient = _MEMORY * self._gradient + (1 - _MEMORY) * found.gradient
        self._noise = _MEMORY * self._noise + (1 - _MEMORY) * found.noise
        values = {"gradient_square": found.gradient, "gradient_noise": found.noise}
        if self._gradient > 0:
            scale = max(0.0, self._noise) / self._gradient
            values |= {"noise_scale": scale, "noise_scale_in_batches": scale / tokens}
        return values


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


_ONE_MICRO_BATCH = (
    "The noise scale is not measured at a step of one micro-batch, for it takes two. Set train.micro_batch to half "
    "of train.global_batch or less."
)


def describe(values: Mapping[str, float]) -> str:
    """The values of a `Measured` event in one line."""
    parts = []
    if "noise_scale" in values:
        batches = values["noise_scale_in_batches"]
        parts.append(
            f"noise scale {values['noise_scale']:,.0f} supervised tokens, {batches:.2g} × this batch"
        )
    elif "gradient_noise" in values:
        parts.append("noise scale not known yet: noise hides the gradient")
    norms = {name.removeprefix(LAYER): norm for name, norm in values.items() if name.startswith(LAYER)}
    if norms:
        largest, smallest = max(norms, key=norms.__getitem__), min(norms, key=norms.__getitem__)
        parts.append(
            f"gradient norms from {norms[smallest]:.3g} ({smallest}) to {norms[largest]:.3g} ({largest})"
        )
    return " · ".join(parts)
