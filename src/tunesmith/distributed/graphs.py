"""Forward and backward of a micro-batch as recorded CUDA graphs, for models that launch faster than they compute.

A 135M model runs some two thousand kernels of a few microseconds in a step; the Python that launches them takes
several times as long as they do. A graph is recorded once for a bucket of shapes (`contracts.buckets`) and then
started by one call, with the batch copied into the tensors that it was recorded on.

    bucket seen first    runs as it is: compiles kernels, builds plans, makes gradients
    seen again           is recorded, then replayed
    later                is replayed

Gradients lie in one flat buffer and are added up inside the graph, so accumulation over micro-batches needs no
work on the host. Graphs share one pool of memory: they run one after the other, and what they leave behind (the
loss, the gradients) is outside of it.

What a graph cannot hold: decisions on the host that differ from batch to batch (dropout seeds, offloading,
fallbacks to stock layers). Whoever builds the backend switches graphs on only where there are none.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tunesmith.contracts.batch import TokenBatch
from tunesmith.contracts.buckets import Bucket, bucket_of, pad_to
from tunesmith.contracts.errors import first_line

MOST_GRAPHS = 24
"""Buckets that are recorded; further ones run as they are. A graph of 2,000 kernels holds some 10 MB."""

ALIGNMENT = 8
"""Elements of a gradient in the flat buffer are padded to a multiple of this."""

Run = Callable[[TokenBatch, Tensor], Tensor]
"""(batch on the device, the step's denominator as a scalar on the device) → loss that can be differentiated."""

Recorder = Callable[[Callable[[], None]], Callable[[], None]]
"""Records what a function enqueues, without running it, and returns what runs it."""


class CudaRecorder:
    """Records CUDA graphs into one pool of memory.

    Args:
        device: where they run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """Record `enqueue`, which must neither wait for the device nor depend on what it computes."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=self._pool):
            enqueue()
        return graph.replay


class GradientBuffer:
    """One flat buffer a type that the `.grad` of the parameters are views of; holds only those that have a gradient.

    Args:
        parameters: their gradients move into the buffer with the values that they have.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = [p for p in parameters if p.grad is not None]
        self.flat: list[Tensor] = []
        by_type: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
        for parameter in self.parameters:
            by_type.setdefault((parameter.dtype, parameter.device), []).append(parameter)
        for (dtype, device), group in by_type.items():
            # each begins where 16 bytes can be read at once
            sizes = [-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in group]
            flat = torch.zeros(sum(sizes), dtype=dtype, device=device)
            for parameter, part in zip(group, flat.split(sizes), strict=True):
                assert parameter.grad is not None
                parameter.grad = part[: parameter.numel()].view_as(parameter).copy_(parameter.grad)
            self.flat.append(flat)

    @property
    def views(self) -> list[Tensor]:
        """The gradients, in the order of `parameters`."""
        return [p.grad for p in self.parameters if p.grad is not None]

    def zero(self) -> None:
        """Clear all gradients in place."""
        for flat in self.flat:
            flat.zero_()


@dataclass(slots=True)
class _Recorded:
    """A graph with the tensors that it reads and writes."""

    batch: TokenBatch
    total: Tensor
    loss: Tensor
    replay: Callable[[], None]


class MicroBatchGraphs:
    """Runs micro-batches forward and backward, from recorded graphs where their shapes repeat.

    Args:
        parameters: those that train.
        device: where batches go.
        run: the loss of a batch.
        recorder: how graphs are recorded; CUDA graphs if not given.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        device: torch.device,
        run: Run,
        recorder: Recorder | None = None,
    ) -> None:
        self._parameters = list(parameters)
        self._device, self._run = device, run
        self._recorder = recorder if recorder is not None else CudaRecorder(device)
        self._recorded: dict[Bucket, _Recorded] = {}
        self._seen: Counter[Bucket] = Counter()
        self._buffer: GradientBuffer | None = None
        self._loss_type = torch.float32
        self._works = True

    @property
    def recorded(self) -> int:
        """Number of graphs."""
        return len(self._recorded)

    def forward_backward(self, batch: TokenBatch, total: float) -> Tensor:
        """Add the gradients of a CPU batch to `.grad` and return its loss, a detached scalar on the device."""
        bucket = bucket_of(batch)
        padded = pad_to(batch, bucket)
        self._seen[bucket] += 1
        graph = self._recorded.get(bucket)
        if graph is None and self._seen[bucket] > 1 and self._works and len(self._recorded) < MOST_GRAPHS:
            graph = self._record(bucket, padded, total)
        if graph is None:
            return self._run_once(padded, total)
        for target, source in zip(graph.batch.tensors(), padded.tensors(), strict=True):
            target.copy_(source, non_blocking=True)
        graph.total.fill_(total)
        graph.replay()
        return graph.loss.clone()

    def zero_grad(self) -> bool:
        """Clear the gradients if they lie in the buffer; says whether they do."""
        if self._buffer is None:
            return False
        self._buffer.zero()
        return True

    def _run_once(self, padded: TokenBatch, total: float) -> Tensor:
        loss = self._run(padded.to(self._device), self._scalar(total))
        loss.backward()
        if self._buffer is None:
            self._buffer = GradientBuffer(self._parameters)
        self._loss_type = loss.dtype
        return loss.detach()

    def _scalar(self, value: float) -> Tensor:
        return torch.full((), value, dtype=torch.float32, device=self._device)

    def _record(self, bucket: Bucket, padded: TokenBatch, total: float) -> _Recorded | None:
        assert self._buffer is not None
        buffer, batch, scalar = self._buffer, padded.to(self._device), self._scalar(total)
        loss = torch.zeros((), dtype=self._loss_type, device=self._device)

        def enqueue() -> None:
            value = self._run(batch, scalar)
            # not backward(): nodes that write `.grad` belong to the stream that made them, which is another one
            gradients = torch.autograd.grad(value, buffer.parameters)
            torch._foreach_add_(buffer.views, list(gradients))
            loss.copy_(value.detach())

        try:
            replay = self._recorder(enqueue)
        except RuntimeError as error:
            self._works = False
            warnings.warn(
                f"CUDA graphs are off for this run, which is slower but exact: {first_line(error)}",
                stacklevel=2,
            )
            return None
        recorded = _Recorded(batch, scalar, loss, replay)
        self._recorded[bucket] = recorded
        return recorded
