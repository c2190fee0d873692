"""cuDNN's attention graphs on the fused buffer, through `nvidia-cudnn-frontend`: equal and ragged documents.

Both read q, k and v with strides where the GEMM left them and write their gradients side by side into one buffer.
torch's own operator for cuDNN returns three gradients instead, and joining them costs 0.1 ms a layer at 8,192
tokens of the 8B shape. Graphs are built once for a shape; documents and lengths of the ragged form are bucketed,
so that most rows find a graph.

Shape suffixes: T tokens, N columns of the fused buffer, H query heads, G key/value heads, K head size.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tunesmith.kernels.packed import Documents, Heads, Saved, Scores, takes_half

SHORTEST_EQUAL = 64
"""Below so many tokens a document the batch of tiny matrices is slower than one packed row."""

PART_BYTES = 640 << 20
"""Workspace of backward beyond which it takes the heads in parts, one after the other. Rows of the 8B shape then have
20,000 tokens at least: blocks enough in each part to keep a card busy."""


@functools.cache
def cudnn_frontend() -> Any:
    """The module `cudnn` of nvidia-cudnn-frontend, or None where it is not installed."""
    try:
        import cudnn  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return None
    return cudnn


@functools.cache
def compute_capability() -> tuple[int, int]:
    """That of the current card."""
    return torch.cuda.get_device_capability()


def cudnn_computes(fused_TN: Tensor, heads: Heads, scores: Scores, widest: int = 128) -> bool:
    """Whether cuDNN's attention takes this type, layout and cap here, and runs need not repeat bit for bit."""
    # its backward adds up dq in whatever order blocks finish; FlashAttention-2 has an ordered form
    ordered = torch.are_deterministic_algorithms_enabled()
    able = scores.softcap is None and takes_half(fused_TN, heads, widest)
    return able and not ordered and compute_capability() >= (9, 0)


def _graph_computes(fused_TN: Tensor, heads: Heads, scores: Scores) -> bool:
    """`cudnn_computes` through the frontend, whose backward takes heads of 256 on Hopper alone."""
    if cudnn_frontend() is None:
        return False
    on_hopper = fused_TN.is_cuda and compute_capability()[0] == 9
    return cudnn_computes(fused_TN, heads, scores, 256 if on_hopper else 128)


# ---------------------------------------------------------------------- graphs


@dataclass(frozen=True, slots=True)
class _Shape:
    """What a graph depends on.

    Attributes:
        documents: their number, bucketed in the ragged form.
        length: of each, or of the longest, bucketed.
        heads: layout of the fused buffer.
        part: the heads that one run of the graph computes, some or all of them.
        scores: scale and window.
        stride: elements from a row of the fused buffer to the next.
        grad_stride: the same in the buffer of its gradient.
        out_stride: the same in the output.
        dtype: bfloat16 or float16.
        ragged: documents of any lengths, whose places are given at every call.
    """

    documents: int
    length: int
    heads: Heads
    part: Heads
    scores: Scores
    stride: int
    grad_stride: int
    out_stride: int
    dtype: torch.dtype
    ragged: bool


@dataclass(frozen=True, slots=True)
class _Plan:
    """A built graph with its tensors by name, and the bytes of its workspace."""

    graph: Any
    tensors: dict[str, Any]
    workspace: int


class _Builder:
    """Declares the tensors of a graph."""

    def __init__(self, shape: _Shape) -> None:
        kinds = cudnn_frontend().data_type
        self.shape, self.float, self.tensors = shape, kinds.FLOAT, dict[str, Any]()
        self.io = kinds.BFLOAT16 if shape.dtype == torch.bfloat16 else kinds.HALF
        self.graph = cudnn_frontend().pygraph(
            io_data_type=self.io, intermediate_data_type=kinds.FLOAT, compute_data_type=kinds.FLOAT
        )
        heads, part = shape.heads, shape.part
        # name: (heads, elements of a head, from row to row, offsets of the documents, type)
        self._layouts = {
            "q": (part.query, heads.size, shape.stride, "fused_at", self.io),
            "k": (part.key_value, heads.size, shape.stride, "fused_at", self.io),
            "v": (part.key_value, heads.size, shape.stride, "fused_at", self.io),
            "out": (part.query, heads.size, shape.out_stride, "out_at", self.io),
            "grad": (part.query, heads.size, heads.query * heads.size, "out_grad_at", self.io),
            "lse": (part.query, 1, heads.query, "lse_at", self.float),
        }
        for name in ("q", "k", "v"):
            count, size, _, _, kind = self._layouts[name]
            self._layouts[f"d{name}"] = (count, size, shape.grad_stride, "grad_at", kind)

    def _vector(self, name: str, length: int, kind: Any) -> Any:
        if name not in self.tensors:
            self.tensors[name] = self.graph.tensor(
                name=name, dim=[length, 1, 1, 1], stride=[1, 1, 1, 1], data_type=kind
            )
        return self.tensors[name]

    def _place(self, name: str, tensor: Any) -> None:
        if self.shape.ragged:
            offsets = self._layouts[name][3]
            int64 = cudnn_frontend().data_type.INT64
            tensor.set_ragged_offset(self._vector(offsets, self.shape.documents + 1, int64))
        self.tensors[name] = tensor

    def _extent(self, name: str) -> tuple[list[int], list[int]]:
        count, size, row, _, _ = self._layouts[name]
        batch, length = self.shape.documents, self.shape.length
        if name == "lse" and not self.shape.ragged:  # a matrix a document, as cuDNN packs it
            return [batch, count, length, 1], [count * length, length, 1, 1]
        return [batch, count, length, size], [length * row, size, row, 1]

    def input(self, name: str) -> Any:
        """Declare a tensor that the caller provides."""
        dim, stride = self._extent(name)
        tensor = self.graph.tensor(name=name, dim=dim, stride=stride, data_type=self._layouts[name][4])
        self._place(name, tensor)
        return tensor

    def output(self, name: str, tensor: Any) -> None:
        """Say where a result goes."""
        dim, stride = self._extent(name)
        tensor.set_output(True).set_dim(dim).set_stride(stride).set_data_type(self._layouts[name][4])
        self._place(name, tensor)

    def options(self) -> dict[str, Any]:
        """What forward and backward are both told."""
        heads, scores = self.shape.heads, self.shape.scores
        options: dict[str, Any] = {"attn_scale": scores.factor(heads), "use_causal_mask": True}
        if scores.window is not None:  # cuDNN too counts the query's own key: row < column + length
            options["sliding_window_length"] = scores.window
        if self.shape.ragged:
            lengths = self._vector("lengths", self.shape.documents, cudnn_frontend().data_type.INT32)
            options |= {"use_padding_mask": True, "seq_len_q": lengths, "seq_len_kv": lengths}
        return options

    def build(self) -> _Plan:
        """Let cuDNN choose a kernel."""
        self.graph.build([cudnn_frontend().heur_mode.A])
        return _Plan(self.graph, self.tensors, self.graph.get_workspace_size())


@functools.lru_cache(maxsize=64)
def _forward_plan(shape: _Shape) -> _Plan:
    builder = _Builder(shape)
    q, k, v = (builder.input(name) for name in ("q", "k", "v"))
    out, lse = builder.graph.sdpa(name="forward", q=q, k=k, v=v, generate_stats=True, **builder.options())
    builder.output("out", out)
    builder.output("lse", lse)
    return builder.build()


@functools.lru_cache(maxsize=64)
def _backward_plan(shape: _Shape) -> _Plan:
    builder = _Builder(shape)
    q, k, v, out, grad, lse = (builder.input(name) for name in ("q", "k", "v", "out", "grad", "lse"))
    results = builder.graph.sdpa_backward(
        name="backward", q=q, k=k, v=v, o=out, dO=grad, stats=lse, **builder.options()
    )
    for name, result in zip(("dq", "dk", "dv"), results, strict=True):
        builder.output(name, result)
    return builder.build()


@functools.cache
def _handle(_device: int) -> Any:
    return cudnn_frontend().create_handle()


def _execute(plan: _Plan, values: dict[str, Tensor]) -> None:
    device = values["q"].device
    workspace = torch.empty(plan.workspace, device=device, dtype=torch.uint8)
    handle = _handle(device.index or 0)
    cudnn_frontend().set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
    pointers = {tensor: values[name] for name, tensor in plan.tensors.items()}
    plan.graph.execute(pointers, workspace, handle=handle)


def _forward(fused_TN: Tensor, shape: _Shape, where: dict[str, Tensor]) -> tuple[Tensor, Saved]:
    heads = shape.heads
    out = fused_TN.new_empty(fused_TN.shape[0], shape.out_stride)[:, : heads.query * heads.size]
    lse = fused_TN.new_empty(fused_TN.shape[0], heads.query, dtype=torch.float32)
    q, k, v = heads.split(fused_TN)
    _execute(_forward_plan(shape), {"q": q, "k": k, "v": v, "out": out, "lse": lse, **where})
    return out, (lse,)


def _backward(
    grad: Tensor, fused_TN: Tensor, output: Tensor, saved: Saved, shape: _Shape, where: dict[str, Tensor]
) -> Tensor:
    grad_TN = fused_TN.new_empty(fused_TN.shape[0], shape.grad_stride)[:, : shape.heads.columns]
    heads, part = shape.heads, backward_part(shape.documents * shape.length, shape.heads, grad.element_size())
    by_head = (heads.query, heads.size)
    (q, k, v), (dq, dk, dv) = heads.split(fused_TN), heads.split(grad_TN)
    of_keys = {"k": k, "v": v, "dk": dk, "dv": dv}
    of_queries = {
        "q": q,
        "dq": dq,
        "out": output.unflatten(-1, by_head),
        "grad": grad.contiguous().unflatten(-1, by_head),
        "lse": saved[0] if shape.ragged else saved[0].view(shape.documents, heads.query, shape.length),
    }
    plan = _backward_plan(replace(shape, part=part))
    for number in range(heads.key_value // part.key_value):
        values = {name: _run(value, number, part.query) for name, value in of_queries.items()}
        values |= {name: _run(value, number, part.key_value) for name, value in of_keys.items()}
        if not shape.ragged:  # the one tensor that cuDNN takes in one piece only, and aligned
            values["lse"] = values["lse"].clone(memory_format=torch.contiguous_format)
        _execute(plan, values | where)
    return grad_TN


def _run(value: Tensor, number: int, heads: int) -> Tensor:
    """The heads of one run, which are the second dimension of everything."""
    return value[:, number * heads : (number + 1) * heads]


def backward_workspace(tokens: int, heads: Heads, itemsize: int) -> int:
    """Bytes that cuDNN takes beside what it reads and writes, to compute so many heads backward.

    Args:
        tokens: documents · length of a graph.
    """
    # ∂k and ∂v for each query head, where several share them
    of_keys = 2 * heads.size * itemsize if heads.query > heads.key_value else 0
    return tokens * heads.query * (4 * (heads.size + 1) + of_keys)


def backward_part(tokens: int, heads: Heads, itemsize: int) -> Heads:
    """As many heads as take `PART_BYTES` at most, one key/value head with its query heads at least."""
    for parts in range(1, heads.key_value + 1):
        if heads.key_value % parts == 0:
            part = Heads(heads.query // parts, heads.key_value // parts, heads.size)
            if backward_workspace(tokens, part, itemsize) <= PART_BYTES:
                break
    return part


# ---------------------------------------------------------------------- documents of one length


def equal_fits(fused_TN: Tensor, heads: Heads, documents: Documents, scores: Scores) -> bool:
    """Whether the dense graph computes this."""
    long_enough = documents.equal and documents.lengths[0] >= SHORTEST_EQUAL
    return long_enough and _graph_computes(fused_TN, heads, scores)


def _equal_shape(
    fused_TN: Tensor, heads: Heads, documents: Documents, scores: Scores, room: int, out_stride: int
) -> _Shape:
    lengths = documents.lengths
    strides = fused_TN.stride(0), heads.columns + room, out_stride
    return _Shape(len(lengths), lengths[0], heads, heads, scores, *strides, fused_TN.dtype, ragged=False)


def equal_forward(
    fused_TN: Tensor, heads: Heads, documents: Documents, scores: Scores, room: int
) -> tuple[Tensor, Saved]:
    """`Backend.forward` for documents of one length."""
    out_stride = heads.query * heads.size + room
    return _forward(fused_TN, _equal_shape(fused_TN, heads, documents, scores, 0, out_stride), {})


def equal_backward(
    grad: Tensor,
    fused_TN: Tensor,
    output: Tensor,
    saved: Saved,
    heads: Heads,
    documents: Documents,
    scores: Scores,
    room: int,
) -> Tensor:
    """`Backend.backward` for documents of one length."""
    shape = _equal_shape(fused_TN, heads, documents, scores, room, output.stride(0))
    return _backward(grad, fused_TN, output, saved, shape, {})


# ---------------------------------------------------------------------- documents of any lengths


def ragged_fits(fused_TN: Tensor, heads: Heads, _documents: Documents, scores: Scores) -> bool:
    """Whether the ragged graph computes this."""
    return _graph_computes(fused_TN, heads, scores)


def _bucket(value: int) -> int:
    """Round up to a power of two, beyond 16 to an eighth of the next one: similar shapes share a graph.

    Building one takes 75 ms, a dozen layers' worth of attention. Blocks past the end of a document cost no time, and
    in backward float32 for dq.
    """
    above = math.ceil(math.log2(value))
    step = 1 << (above if value <= 16 else above - 3)
    return -(-value // step) * step


def ragged_size(documents: Documents) -> tuple[int, int]:
    """(documents, length of each) of the graph for these."""
    return _bucket(len(documents.lengths)), _bucket(max(SHORTEST_EQUAL, documents.longest))


def _ragged_shape(
    fused_TN: Tensor, heads: Heads, documents: Documents, scores: Scores, room: int, out_stride: int
) -> _Shape:
    count, longest = ragged_size(documents)
    strides = fused_TN.stride(0), heads.columns + room, out_stride
    return _Shape(count, longest, heads, heads, scores, *strides, fused_TN.dtype, ragged=True)


def _places(documents: Documents, shape: _Shape) -> dict[str, Tensor]:
    """Offsets and lengths of the documents, padded with empty documents to the graph's count."""
    key = (shape.documents, shape.stride, shape.grad_stride, shape.out_stride, shape.heads)
    if key not in documents.derived:
        cu = documents.cu_seqlens.to(torch.int64)
        spare = shape.documents + 1 - cu.shape[0]
        if spare:
            cu = torch.cat([cu, cu[-1:].expand(spare)])
        at = cu.view(-1, 1, 1, 1)
        documents.derived[key] = {
            "fused_at": at * shape.stride,
            "grad_at": at * shape.grad_stride,
            "out_at": at * shape.out_stride,
            "out_grad_at": at * (shape.heads.query * shape.heads.size),
            "lse_at": at * shape.heads.query,
            "lengths": cu.diff().to(torch.int32).view(-1, 1, 1, 1),
        }
    places: dict[str, Tensor] = documents.derived[key]
    return places


def ragged_forward(
    fused_TN: Tensor, heads: Heads, documents: Documents, scores: Scores, room: int
) -> tuple[Tensor, Saved]:
    """`Backend.forward` for documents of any lengths."""
    shape = _ragged_shape(fused_TN, heads, documents, scores, 0, heads.query * heads.size + room)
    return _forward(fused_TN, shape, _places(documents, shape))


def ragged_backward(
    grad: Tensor,
    fused_TN: Tensor,
    output: Tensor,
    saved: Saved,
    heads: Heads,
    documents: Documents,
    scores: Scores,
    room: int,
) -> Tensor:
    """`Backend.backward` for documents of any lengths."""
    shape = _ragged_shape(fused_TN, heads, documents, scores, room, output.stride(0))
    return _backward(grad, fused_TN, output, saved, shape, _places(documents, shape))
