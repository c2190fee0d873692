"""Packed attention on one fused buffer, forward and backward by hand, behind one table of backends.

The buffer holds `[q heads | k heads | v heads]` of every token, as one GEMM wrote it; backends read it with
strides and write the gradient into a buffer of the same layout, so nothing is split, transposed or joined.

| backend | what it is | where |
|---|---|---|
| cudnn_ragged | cuDNN's graph API with ragged offsets (`nvidia-cudnn-frontend`) | documents of any lengths |
| cudnn_dense | cuDNN through torch's own operator | documents of equal length |
| flash | torch's variable-length FlashAttention-2 | 16-bit types, head size up to 256 |
| sdpa | one `scaled_dot_product_attention` a document | everywhere; the reference |

Measured on one H100 at 16,384 tokens (32 heads, 8 key/value heads, 128 wide), forward / forward and backward in
TFLOP/s of the true causal cost: 4 documents of 4,096: ragged 570 / 477, dense 606 / 500, flash 308 / 278; 32
documents of 512 on average: ragged 322 / 220, flash 155 / 143. Hence the order of the table.

Shape suffixes: T tokens, N columns of the fused buffer, H query heads, G key/value heads, K head size,
B documents of a dense batch, M length of each of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True, slots=True)
class Heads:
    """Layout of the fused buffer.

    Attributes:
        query: number of query heads (H).
        key_value: number of key/value heads (G); H is a multiple of it.
        size: width of a head (K).
        scale: factor on the scores; None is K ** -0.5.
    """

    query: int
    key_value: int
    size: int
    scale: float | None = None

    @property
    def columns(self) -> int:
        """Columns of the fused buffer."""
        return (self.query + 2 * self.key_value) * self.size

    @property
    def factor(self) -> float:
        """The factor on the scores as a number."""
        return self.scale if self.scale is not None else self.size**-0.5

    def split(self, fused_TN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views `[T, H, K]`, `[T, G, K]`, `[T, G, K]` of q, k and v."""
        q_end = self.query * self.size
        k_end = q_end + self.key_value * self.size
        parts = (fused_TN[:, :q_end], fused_TN[:, q_end:k_end], fused_TN[:, k_end : self.columns])
        q_TN, k_TN, v_TN = parts
        return (
            q_TN.unflatten(-1, (self.query, self.size)),
            k_TN.unflatten(-1, (self.key_value, self.size)),
            v_TN.unflatten(-1, (self.key_value, self.size)),
        )


@dataclass(frozen=True, slots=True)
class Documents:
    """Where documents begin and end: host lengths, and the same on the device.

    Attributes:
        lengths: host integers that sum to T.
        cu_seqlens: int32 `[D + 1]` on the device.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor

    @property
    def longest(self) -> int:
        """Length of the longest document, a host integer."""
        return max(self.lengths)

    @property
    def equal(self) -> bool:
        """Whether all documents have the same length."""
        return min(self.lengths) == max(self.lengths)


Saved = tuple[Tensor, ...]
"""What a backend keeps for its backward besides the fused buffer and the output."""


@dataclass(frozen=True, slots=True)
class Backend:
    """A row of the table.

    Attributes:
        fits: whether it computes this device, type, layout and set of documents.
        forward: (fused_TN, heads, documents) → output `[T, H·K]` and what backward needs.
        backward: (grad `[T, H·K]`, fused_TN, output, saved, heads, documents) → gradient of the fused buffer.
    """

    fits: Callable[[Tensor, Heads, Documents], bool]
    forward: Callable[[Tensor, Heads, Documents], tuple[Tensor, Saved]]
    backward: Callable[[Tensor, Tensor, Tensor, Saved, Heads, Documents], Tensor]


# ---------------------------------------------------------------------- reference


def _per_document(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, heads: Heads, lengths: tuple[int, ...]
) -> Tensor:
    outputs, start = [], 0
    for length in lengths:
        rows = slice(start, start + length)
        q, k, v = (part[rows].transpose(0, 1)[None] for part in (q_THK, k_TGK, v_TGK))
        out = scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=heads.factor, enable_gqa=heads.query != heads.key_value
        )
        outputs.append(out[0].transpose(0, 1))
        start += length
    return torch.cat(outputs).flatten(1)


def _sdpa_forward(fused_TN: Tensor, heads: Heads, documents: Documents) -> tuple[Tensor, Saved]:
    return _per_document(*heads.split(fused_TN), heads, documents.lengths), ()


def _sdpa_backward(
    grad: Tensor, fused_TN: Tensor, _output: Tensor, _saved: Saved, heads: Heads, documents: Documents
) -> Tensor:
    leaf_TN = fused_TN.detach().requires_grad_()
    with torch.enable_grad():
        output = _per_document(*heads.split(leaf_TN), heads, documents.lengths)
    (grad_TN,) = torch.autograd.grad(output, leaf_TN, grad)
    return grad_TN


# ---------------------------------------------------------------------- torch's FlashAttention-2


def _flash_fits(fused_TN: Tensor, heads: Heads, _documents: Documents) -> bool:
    half = fused_TN.dtype in (torch.bfloat16, torch.float16)
    return fused_TN.is_cuda and half and heads.size <= 256 and heads.size % 8 == 0


def _flash_forward(fused_TN: Tensor, heads: Heads, documents: Documents) -> tuple[Tensor, Saved]:
    q, k, v = heads.split(fused_TN)
    cu, longest = documents.cu_seqlens, documents.longest
    out, lse, state, offset, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu, cu, longest, longest, 0.0, True, False, scale=heads.factor
    )
    return out.flatten(1), (lse, state, offset)


def _flash_backward(
    grad: Tensor, fused_TN: Tensor, output: Tensor, saved: Saved, heads: Heads, documents: Documents
) -> Tensor:
    q, k, v = heads.split(fused_TN)
    lse, state, offset = saved
    cu, longest = documents.cu_seqlens, documents.longest
    shape = (heads.query, heads.size)
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        grad.unflatten(-1, shape), q, k, v, output.unflatten(-1, shape), lse, cu, cu, longest, longest,
        0.0, True, state, offset, scale=heads.factor,
    )  # fmt: skip
    return torch.cat([part.flatten(1) for part in (dq, dk, dv)], dim=1)


# ---------------------------------------------------------------------- cuDNN through torch


def _cudnn_ok(fused_TN: Tensor, heads: Heads) -> bool:
    half = fused_TN.dtype in (torch.bfloat16, torch.float16)
    fits = fused_TN.is_cuda and half and heads.size <= 128 and heads.size % 8 == 0
    # its backward adds up dq in whatever order blocks finish; FlashAttention-2 has an ordered form
    return fits and not torch.are_deterministic_algorithms_enabled() and _compute_capability() >= (9, 0)


@functools.cache
def _compute_capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability()


def _dense_fits(fused_TN: Tensor, heads: Heads, documents: Documents) -> bool:
    # below 64 tokens a document the batch of tiny matrices is slower than one packed row
    return documents.equal and documents.lengths[0] >= 64 and _cudnn_ok(fused_TN, heads)


def _to_dense(part_THK: Tensor, length: int) -> Tensor:
    dense_BHMK: Tensor = part_THK.unflatten(0, (-1, length)).transpose(1, 2)
    return dense_BHMK


def _dense_forward(fused_TN: Tensor, heads: Heads, documents: Documents) -> tuple[Tensor, Saved]:
    q, k, v = (_to_dense(part, documents.lengths[0]) for part in heads.split(fused_TN))
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, True, False, scale=heads.factor
    )
    out: Tensor = found[0]
    lse, state, offset = found[1], found[6], found[7]
    rows: Tensor = out.transpose(1, 2).flatten(0, 1).flatten(1)
    return rows, (lse, state, offset)


def _dense_backward(
    grad: Tensor, fused_TN: Tensor, output: Tensor, saved: Saved, heads: Heads, documents: Documents
) -> Tensor:
    length = documents.lengths[0]
    q, k, v = (_to_dense(part, length) for part in heads.split(fused_TN))
    lse, state, offset = saved
    shape = (heads.query, heads.size)
    # the operator misreads a gradient with other strides than the output's: both are contiguous [T, H·K] here
    grad_out, out = (_to_dense(part.contiguous().unflatten(-1, shape), length) for part in (grad, output))
    dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        grad_out,
        q,
        k,
        v,
        out,
        lse,
        state,
        offset,
        None,
        None,
        None,
        length,
        length,
        0.0,
        True,
        scale=heads.factor,
    )
    return torch.cat([part.transpose(1, 2).flatten(0, 1).flatten(1) for part in (dq, dk, dv)], dim=1)


# ---------------------------------------------------------------------- cuDNN's ragged graph


@functools.cache
def cudnn_frontend() -> Any:
    """The module `cudnn` of nvidia-cudnn-frontend, or None where it is not installed."""
    try:
        import cudnn  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return None
    return cudnn


def _ragged_fits(fused_TN: Tensor, heads: Heads, _documents: Documents) -> bool:
    return _cudnn_ok(fused_TN, heads) and cudnn_frontend() is not None


def _bucket(value: int) -> int:
    """Round up to an eighth of the next power of two, so that plans of similar shapes are shared."""
    if value <= 16:
        return 16
    step = 1 << max(0, math.ceil(math.log2(value)) - 3)
    return -(-value // step) * step


@dataclass(frozen=True, slots=True)
class _RaggedPlan:
    """A built graph with its tensors by name, and its workspace's size."""

    graph: Any
    tensors: dict[str, Any]
    workspace: int


@dataclass(frozen=True, slots=True)
class _RaggedShape:
    """What a plan depends on; documents and longest are bucketed."""

    documents: int
    longest: int
    heads: Heads
    stride: int
    dtype: torch.dtype
    backward: bool


@functools.lru_cache(maxsize=64)
def _ragged_plan(shape: _RaggedShape) -> _RaggedPlan:
    cudnn = cudnn_frontend()
    kinds = cudnn.data_type
    io = kinds.BFLOAT16 if shape.dtype == torch.bfloat16 else kinds.HALF
    graph = cudnn.pygraph(io_data_type=io, intermediate_data_type=kinds.FLOAT, compute_data_type=kinds.FLOAT)
    batch, longest, heads = shape.documents, shape.longest, shape.heads
    tensors: dict[str, Any] = {}

    def strided(name: str, count: int, row: int, ragged: str, kind: Any = io, size: int = heads.size) -> Any:
        dim, stride = [batch, count, longest, size], [longest * row, size, row, 1]
        tensors[name] = graph.tensor(name=name, dim=dim, stride=stride, data_type=kind)
        tensors[name].set_ragged_offset(tensors[ragged])
        return tensors[name]

    def vector(name: str, length: int, kind: Any) -> Any:
        tensors[name] = graph.tensor(name=name, dim=[length, 1, 1, 1], stride=[1, 1, 1, 1], data_type=kind)
        return tensors[name]

    for name in ("fused_at", "out_at", "lse_at"):
        vector(name, batch + 1, kinds.INT64)
    vector("lengths", batch, kinds.INT32)
    out_row = heads.query * heads.size
    q = strided("q", heads.query, shape.stride, "fused_at")
    k = strided("k", heads.key_value, shape.stride, "fused_at")
    v = strided("v", heads.key_value, shape.stride, "fused_at")
    common = {
        "attn_scale": heads.factor,
        "use_causal_mask": True,
        "use_padding_mask": True,
        "seq_len_q": tensors["lengths"],
        "seq_len_kv": tensors["lengths"],
    }
    if shape.backward:
        out = strided("out", heads.query, out_row, "out_at")
        grad = strided("grad", heads.query, out_row, "out_at")
        lse = strided("lse", heads.query, heads.query, "lse_at", kinds.FLOAT, 1)
        results = graph.sdpa_backward(name="backward", q=q, k=k, v=v, o=out, dO=grad, stats=lse, **common)
        for name, result, count in zip(
            ("dq", "dk", "dv"), results, (heads.query, heads.key_value, heads.key_value), strict=True
        ):
            _mark_output(result, batch, count, longest, heads.size, shape.stride, tensors["fused_at"], io)
            tensors[name] = result
    else:
        out, lse = graph.sdpa(name="forward", q=q, k=k, v=v, generate_stats=True, **common)
        _mark_output(out, batch, heads.query, longest, heads.size, out_row, tensors["out_at"], io)
        _mark_output(lse, batch, heads.query, longest, 1, heads.query, tensors["lse_at"], kinds.FLOAT)
        tensors["out"], tensors["lse"] = out, lse
    graph.build([cudnn.heur_mode.A])
    return _RaggedPlan(graph, tensors, graph.get_workspace_size())


def _mark_output(
    result: Any, batch: int, count: int, longest: int, size: int, row: int, ragged: Any, kind: Any
) -> None:
    result.set_output(True).set_dim([batch, count, longest, size]).set_stride([longest * row, size, row, 1])
    result.set_data_type(kind)
    result.set_ragged_offset(ragged)


def _ragged_inputs(documents: Documents, batch: int, heads: Heads, stride: int) -> dict[str, Tensor]:
    """Offsets and lengths of the documents, padded with empty documents to the bucket's count."""
    cu = documents.cu_seqlens.to(torch.int64)
    spare = batch + 1 - cu.shape[0]
    if spare:
        cu = torch.cat([cu, cu[-1:].expand(spare)])
    at = cu.view(-1, 1, 1, 1)
    return {
        "fused_at": at * stride,
        "out_at": at * (heads.query * heads.size),
        "lse_at": at * heads.query,
        "lengths": cu.diff().to(torch.int32).view(-1, 1, 1, 1),
    }


def _execute(plan: _RaggedPlan, values: dict[str, Tensor]) -> None:
    device = values["q"].device
    workspace = torch.empty(plan.workspace, device=device, dtype=torch.uint8)
    handle = _cudnn_handle(device.index or 0)
    cudnn_frontend().set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
    plan.graph.execute(
        {plan.tensors[name]: value for name, value in values.items()}, workspace, handle=handle
    )


@functools.cache
def _cudnn_handle(_device: int) -> Any:
    return cudnn_frontend().create_handle()


def _ragged_shape(fused_TN: Tensor, heads: Heads, documents: Documents, *, backward: bool) -> _RaggedShape:
    count = _bucket(len(documents.lengths)) if len(documents.lengths) > 1 else 1
    return _RaggedShape(
        count, _bucket(documents.longest), heads, fused_TN.stride(0), fused_TN.dtype, backward
    )


def _ragged_forward(fused_TN: Tensor, heads: Heads, documents: Documents) -> tuple[Tensor, Saved]:
    shape = _ragged_shape(fused_TN, heads, documents, backward=False)
    plan = _ragged_plan(shape)
    out = fused_TN.new_empty(fused_TN.shape[0], heads.query * heads.size)
    lse = fused_TN.new_empty(fused_TN.shape[0], heads.query, dtype=torch.float32)
    q, k, v = heads.split(fused_TN)
    where = _ragged_inputs(documents, shape.documents, heads, shape.stride)
    _execute(plan, {"q": q, "k": k, "v": v, "out": out, "lse": lse, **where})
    return out, (lse,)


def _ragged_backward(
    grad: Tensor, fused_TN: Tensor, output: Tensor, saved: Saved, heads: Heads, documents: Documents
) -> Tensor:
    shape = _ragged_shape(fused_TN, heads, documents, backward=True)
    plan = _ragged_plan(shape)
    grad_TN = torch.empty_strided(
        fused_TN.shape, fused_TN.stride(), dtype=fused_TN.dtype, device=fused_TN.device
    )
    q, k, v = heads.split(fused_TN)
    dq, dk, dv = heads.split(grad_TN)
    values = {"q": q, "k": k, "v": v, "out": output, "grad": grad.contiguous(), "lse": saved[0]}
    where = _ragged_inputs(documents, shape.documents, heads, shape.stride)
    _execute(plan, {**values, "dq": dq, "dk": dk, "dv": dv, **where})
    return grad_TN


# ---------------------------------------------------------------------- the table


BACKENDS: dict[str, Backend] = {
    "cudnn_dense": Backend(_dense_fits, _dense_forward, _dense_backward),
    "cudnn_ragged": Backend(_ragged_fits, _ragged_forward, _ragged_backward),
    "flash": Backend(_flash_fits, _flash_forward, _flash_backward),
    "sdpa": Backend(lambda *_: True, _sdpa_forward, _sdpa_backward),
}
"""In order of preference; `choose_backend` takes the first that fits."""

switched_off: set[str] = set()
"""Backends that failed the start-up check on this card; `choose_backend` passes over them."""


def choose_backend(fused_TN: Tensor, heads: Heads, documents: Documents) -> str:
    """The fastest row of `BACKENDS` that computes this exactly."""
    return next(
        name
        for name, row in BACKENDS.items()
        if name not in switched_off and row.fits(fused_TN, heads, documents)
    )


def attention_forward(
    fused_TN: Tensor, heads: Heads, documents: Documents, *, backend: str | None = None
) -> tuple[Tensor, str, Saved]:
    """Causal attention within each document of a packed row.

    Args:
        fused_TN: `[T, (H + 2G)·K]`, q, k and v side by side; rows may be further apart than they are wide.

    Returns:
        The output `[T, H·K]`, the backend that computed it, and what its backward needs.
    """
    name = backend or choose_backend(fused_TN, heads, documents)
    output, saved = BACKENDS[name].forward(fused_TN, heads, documents)
    return output, name, saved


def attention_backward(
    grad: Tensor,
    fused_TN: Tensor,
    output: Tensor,
    saved: Saved,
    backend: str,
    heads: Heads,
    documents: Documents,
) -> Tensor:
    """Gradient of the fused buffer `[T, (H + 2G)·K]`, given that of the output `[T, H·K]`."""
    return BACKENDS[backend].backward(grad, fused_TN, output, saved, heads, documents)
