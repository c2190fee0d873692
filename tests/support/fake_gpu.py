"""A GPU that computes nothing and counts bytes: what a training step allocates, at any size, on any machine.

Tensors have shapes and no memory (`FakeTensorMode`). Kernels are launched into nothing, after they have allocated
what they allocate on a GPU; matrix products with float32 results are those of CUDA. Autograd, PEFT, transformers and
all of our own code run as they are, so tensors live exactly as long as they do on a device. `Live` counts them by
storage, rounded as CUDA's allocator rounds. What libraries allocate inside a call (cuBLAS, cuDNN) is not in it but
for attention's workspace, which the backend here allocates as ours does.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import pkgutil
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tunesmith.kernels
import tunesmith.models
from tunesmith.kernels import attention, attention_cudnn, launch, linear_logprob, packed
from tunesmith.models import install, offload, projections
from tunesmith.planning import policies

BLOCK = 512
"""CUDA's allocator hands out multiples of it."""


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that are alive.

    Attributes:
        now: bytes now.
        peak: the most there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, Any] = {}
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.count(tensor)
        return result

    def count(self, tensor: Tensor) -> None:
        """Count the storage of a tensor until it dies."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self._known[key] = weakref.ref(storage, lambda _: self._gone(key, size))
        self.sizes[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int) -> None:
        del self._known[key], self.sizes[key]
        self.now -= size


class Linear4bit(nn.Linear):
    """Weights in NF4 as bitsandbytes holds them, nested scales included; recognised by its name."""

    @classmethod
    def of(cls, linear: nn.Linear) -> Linear4bit:
        """The same layer in 4 bits."""
        count = linear.weight.numel()
        with torch.device("meta"):
            module = cls(linear.in_features, linear.out_features, bias=False)
        module.weight = nn.Parameter(torch.empty(count // 2, 1, dtype=torch.uint8), requires_grad=False)
        module.bias = linear.bias
        blocks = -(-count // 64)
        outer = SimpleNamespace(absmax=torch.empty(-(-blocks // 256)), code=torch.empty(256), blocksize=256)
        module.weight.quant_state = SimpleNamespace(
            quant_type="nf4", nested=True, absmax=torch.empty(blocks, dtype=torch.uint8), state2=outer,
            offset=torch.empty(()), code=torch.empty(16), blocksize=64,
        )  # fmt: skip
        return module


class FakeOffloader(offload.Offloader):
    """Lets go of tensors as the real one does: one layer is leaving, and one is coming beside the one asked for."""

    def __init__(self) -> None:
        super().__init__(enabled=False)
        self._order: list[weakref.ref[Any]] = []
        self._on_the_way: deque[Any] = deque()

    def push(self, tensors: list[Tensor]) -> Any:
        handle = offload.Handle([tensor.shape for tensor in tensors])
        handle.device = [offload.whole_rows(tensor) for tensor in tensors]
        handle.host = [(rows.shape, rows.dtype) for rows in handle.device]  # type: ignore[misc]
        self._order.append(weakref.ref(handle))
        self._next(handle)
        return handle

    def advance(self) -> None:
        self._next(None)

    def _next(self, handle: Any) -> None:
        self._on_the_way.append(handle)
        while len(self._on_the_way) > policies.IN_FLIGHT:
            gone = self._on_the_way.popleft()
            if gone is not None:
                gone.device = []

    def pull(self, handle: Any) -> list[Tensor]:
        self._bring(handle)
        del self._order[self._order.index(weakref.ref(handle)) :]
        before = next((h for ref in reversed(self._order) if (h := ref()) is not None), None)
        if before is not None:
            self._bring(before)
        return handle.hand_over()

    def _bring(self, handle: Any) -> None:
        if handle in self._on_the_way:
            self._on_the_way.remove(handle)
        if handle.host and not handle.device:
            handle.device = [torch.empty(shape, dtype=dtype) for shape, dtype in handle.host]
        handle.host = []


def _attention_forward(
    fused_TN: Tensor, heads: packed.Heads, _documents: Any, _scores: Any, room: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    columns = heads.query * heads.size
    out = fused_TN.new_empty(fused_TN.shape[0], columns + room)[:, :columns]
    return out, (fused_TN.new_empty(fused_TN.shape[0], heads.query, dtype=torch.float32),)


def _attention_backward(
    grad: Tensor,
    fused_TN: Tensor,
    _out: Tensor,
    _saved: Any,
    heads: packed.Heads,
    documents: Any,
    _s: Any,
    room: int,
) -> Tensor:
    grad_TN = fused_TN.new_empty(fused_TN.shape[0], heads.columns + room)[:, : heads.columns]
    size = (len(documents.lengths), documents.longest)
    if not (documents.equal and documents.longest >= attention_cudnn.SHORTEST_EQUAL):
        size = attention_cudnn.ragged_size(documents)
    part = attention_cudnn.backward_part(math.prod(size), heads, grad.element_size())
    for _ in range(heads.query // part.query):
        taken = attention_cudnn.backward_workspace(math.prod(size), part, grad.element_size())
        workspace = torch.empty(taken, dtype=torch.uint8)
        del workspace
    return grad_TN


def _product(left: Tensor, right: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    wide = dtype if dtype.itemsize > left.dtype.itemsize else left.dtype
    return left.new_empty(left.shape[0], right.shape[1], dtype=wide) if out is None else out


def _adjacent(weights: Sequence[Tensor], dtype: torch.dtype, below: int = 0) -> Tensor | None:
    """`projections._adjacent` by the places in a storage, where tensors have no addresses."""
    first = weights[0]
    spare = getattr(weights[-1], projections._SPARE, 0)
    if first.dtype != dtype or first.ndim != 2 or hasattr(first, "quant_state"):
        return None
    if len(weights) == 1 and not hasattr(first, projections._SPARE):
        return first.detach()
    if len({weight.untyped_storage()._cdata for weight in weights}) > 1:
        return None
    rows = sum(weight.shape[0] for weight in weights) + (below if below <= spare else 0)
    return first.detach().as_strided((rows, first.shape[1]), (first.shape[1], 1), 0)


def _join_weights(bases: Sequence[Any]) -> None:
    """`projections.join_weights`, which asks for plain parameters; fake ones are of another class."""
    weights = [base.weight for base in bases]
    if any(hasattr(weight, "quant_state") for weight in weights):
        return
    counts = [weight.shape[0] for weight in weights]
    joined = torch.empty(sum(counts) + projections.SPARE_ROWS, weights[0].shape[1], dtype=weights[0].dtype)
    for base, rows in zip(bases, joined.split([*counts, projections.SPARE_ROWS]), strict=False):
        base.weight = nn.Parameter(rows, requires_grad=base.weight.requires_grad)
    setattr(bases[-1].weight, projections._SPARE, projections.SPARE_ROWS)


def _modules(package: Any) -> list[Any]:
    names = [info.name for info in pkgutil.iter_modules(package.__path__)]
    return [importlib.import_module(f"{package.__name__}.{name}") for name in names]


# functions and not mocks, which would hold on to what they are called with


def _nothing(*_args: Any, **_options: Any) -> None:
    pass


def _programs(_tensor: Tensor) -> int:
    return 132


def _backend(*_args: Any, **_options: Any) -> str:
    return "fake"


@contextlib.contextmanager
def fake_gpu() -> Iterator[Live]:
    """Everything inside is on a GPU that only counts; tensors are to be made inside."""
    row = packed.Backend(lambda *_: True, _attention_forward, _attention_backward)
    chunk = linear_logprob.CHUNK_BYTES
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context
        for module in _modules(tunesmith.kernels):
            if hasattr(module, "launch") and module is not launch:
                patch(mock.patch.object(module, "launch", _nothing))
            if hasattr(module, "multiprocessors"):
                patch(mock.patch.object(module, "multiprocessors", _programs))
        patch(mock.patch.object(launch, "INTERPRETED", True))
        patch(mock.patch.dict(attention.BACKENDS, {"fake": row}))
        patch(mock.patch.object(attention, "choose_backend", _backend))
        for module in _modules(tunesmith.models):
            if hasattr(module, "product"):
                patch(mock.patch.object(module, "product", _product))
        patch(mock.patch.object(projections, "_adjacent", _adjacent))
        patch(mock.patch.object(install, "join_weights", _join_weights))
        patch(mock.patch.object(linear_logprob, "CHUNK_BYTES_CPU", chunk))
        patch(mock.patch.object(linear_logprob, "_logits_dtype", lambda hidden: hidden.dtype))
        patch(mock.patch.object(linear_logprob, "_add_product_", _nothing))
        patch(FakeTensorMode(allow_non_fake_inputs=True))
        live = patch(Live())
        yield live


def materialise(model: nn.Module) -> None:
    """Give parameters and buffers of a model that was built on the meta device fake memory of their own."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    new = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = new
                tensors[name] = made[id(tensor)]


def in_4_bits(model: Any) -> None:
    """Hold the base weights below all adapters in NF4."""
    for name, module in list(model.named_modules()):
        if name.endswith("base_layer"):
            model.get_submodule(name.rpartition(".")[0]).base_layer = Linear4bit.of(module)
