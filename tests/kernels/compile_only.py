"""Compiles what the launchers would launch, for cards that are not here.

The launchers run on meta tensors with a recorder in place of the launch, so that what is compiled has the very
arguments of real sizes: types, constants, and which integers and pointers are multiples of 16.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tunesmith.kernels import (
    adamw,
    adamw_8bit,
    attention_blocks,
    attention_triton,
    cross_entropy,
    gather_rows,
    glu,
    layer_norm,
    nf4,
    qk_norm,
    residual,
    rms_norm,
    rope,
)

MODULES = (
    adamw,
    adamw_8bit,
    attention_blocks,
    attention_triton,
    cross_entropy,
    gather_rows,
    glu,
    layer_norm,
    nf4,
    qk_norm,
    residual,
    rms_norm,
    rope,
)
SHARED = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB of shared memory that a program can have."""
TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Launch:
    """One launch as Triton specialises it."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    multiples_of_16: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)


def _specialise(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Launch:
    names = kernel.arg_names
    values = dict(zip(names, args, strict=False)) | {k: v for k, v in options.items() if k in names}
    signature, constants, multiples = [], [], []
    for index, param in enumerate(kernel.params):
        value = values[param.name]
        if param.is_constexpr or (type(value) is int and value == 1 and not param.do_not_specialize):
            kind = "constexpr"
            constants.append((param.name, value))
        elif isinstance(value, torch.Tensor):
            kind = TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                multiples.append(index)
        elif isinstance(value, float):
            kind = "fp32"
        else:
            kind = "i32" if value < 2**31 else "i64"
            if value % 16 == 0 and not param.do_not_specialize:
                multiples.append(index)
        signature.append((param.name, kind))
    rest = tuple((k, v) for k, v in options.items() if k not in names)
    return Launch(kernel, tuple(signature), tuple(constants), tuple(multiples), rest)


@contextmanager
def recorded(multiprocessors: int = 132, capability: int = 89) -> Iterator[list[Launch]]:
    """Within it, the public functions launch on any tensor and the launches are listed instead of run."""
    found: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        assert all(0 < extent < 2**31 for extent in grid)
        assert all(extent < 2**16 for extent in grid[1:])
        found.append(_specialise(kernel, args, options))

    replaced: dict[str, Callable[..., Any]] = {
        "launch": record,
        "use_triton": lambda _tensor, _name: True,
        "multiprocessors": lambda _tensor: multiprocessors,
        "card": lambda _tensor: attention_blocks.Card(capability // 10, SHARED[capability]),
    }
    patches = [
        mock.patch.object(module, name, function)
        for module in MODULES
        for name, function in replaced.items()
        if hasattr(module, name)
    ]
    for patch in patches:
        patch.start()
    try:
        yield found
    finally:
        for patch in patches:
            patch.stop()


def compile_for(launch: Launch, capability: int) -> Any:
    """The compiled kernel for one generation of NVIDIA cards."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        fn=launch.kernel,
        signature=dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={(index,): [["tt.divisibility", 16]] for index in launch.multiples_of_16},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))


def resources(compiled: Any) -> tuple[int, int] | None:
    """Registers and bytes of stack (spilled registers) of a thread, or None without NVIDIA's `cuobjdump`."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])
