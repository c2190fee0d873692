"""Time of packed attention by every backend that fits, at the shapes of real models.

    python benchmarks/attention.py [CASE ...] [--backends triton flash]
    python benchmarks/attention.py [CASE ...] --sweep [forward query_gradient key_gradient]

TFLOP/s count two products of blocks in a forward pass and five in a backward pass, over the pairs of query and key
that see each other. `--sweep` times the blocks of `CANDIDATES` in place of those that
`tunesmith.kernels.attention_blocks.BLOCKS` has for the card, one kernel after the other, each with the best of the
ones before; what stands there now is marked.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

if __name__ == "__main__":  # as a script: the root of the project instead of this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.timing import milliseconds
from tunesmith.kernels import attention_blocks
from tunesmith.kernels.attention import BACKENDS, attention_backward, attention_forward
from tunesmith.kernels.attention_blocks import KERNELS, Blocks, blocks_for
from tunesmith.kernels.attention_rows import attention_backward_work, attention_cases, attention_work

_8B = {"heads": 32, "kv_heads": 8, "head_dim": 128}
_MIXED = (1100, 300, 90, 700, 512, 370, 24, 1000)  # 512 on average
_GEMMA_2_9B = {"heads": 16, "kv_heads": 8, "head_dim": 256, "softcap": 50.0}
_GEMMA_3_12B = {"heads": 16, "kv_heads": 8, "head_dim": 256}
_PHI_3 = {"heads": 32, "kv_heads": 32, "head_dim": 96}

CASES: dict[str, Mapping[str, Any]] = {
    "8b": {**_8B, "lengths": (4096,) * 4},
    "8b-512": {**_8B, "lengths": (512,) * 32},
    "8b-mixed": {**_8B, "lengths": _MIXED * 4},
    "mistral": {**_8B, "lengths": (8192,) * 2, "window": 4096},
    "gemma2": {**_GEMMA_2_9B, "lengths": (8192,) * 2},
    "gemma2-window": {**_GEMMA_2_9B, "lengths": (8192,) * 2, "window": 4096},
    "gemma3": {**_GEMMA_3_12B, "lengths": (4096,) * 4},
    "gemma3-window": {**_GEMMA_3_12B, "lengths": (4096,) * 4, "window": 1024},
    "phi3": {**_PHI_3, "lengths": (4096,) * 4},
    "phi3-window": {**_PHI_3, "lengths": (4096,) * 4, "window": 2047},
    "135m": {"heads": 9, "kv_heads": 3, "head_dim": 64, "lengths": (2048,) * 8},
}

CANDIDATES: dict[str, dict[int, Sequence[tuple[int, int, int, int]]]] = {
    # by kernel and head size up to which they are tried: rows, columns, warps, stages
    "forward": {
        64: ((128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 3)),
        128: (
            (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 32, 8, 4), (128, 32, 4, 3),
            (64, 64, 4, 2), (64, 64, 4, 3), (256, 64, 16, 2),
        ),
        256: ((128, 64, 8, 2), (128, 32, 8, 2), (128, 32, 8, 3), (64, 64, 4, 2), (64, 32, 4, 2), (64, 64, 8, 2)),
    },
    "query_gradient": {
        64: ((128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 4, 3), (64, 64, 4, 3), (128, 128, 8, 2)),
        128: (
            (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 32, 8, 3), (64, 64, 4, 2), (64, 32, 4, 3),
            (256, 32, 16, 2),
        ),
        256: ((128, 32, 8, 2), (64, 64, 8, 2), (64, 32, 4, 2), (128, 64, 8, 1), (64, 32, 8, 2)),
    },
    "key_gradient": {
        64: ((64, 128, 8, 3), (64, 128, 8, 2), (64, 64, 4, 3), (128, 128, 8, 2), (64, 64, 8, 2)),
        128: (
            (64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 2), (32, 128, 8, 3), (64, 128, 8, 1), (64, 64, 4, 2),
            (32, 64, 4, 3), (64, 64, 8, 2), (128, 128, 16, 2),
        ),
        256: ((32, 64, 8, 2), (32, 64, 8, 3), (64, 64, 8, 2), (64, 64, 8, 1), (32, 32, 8, 2), (64, 128, 16, 1)),
    },
}  # fmt: skip


def _time(inputs: dict[str, Any], backend: str) -> tuple[float, float]:
    """Milliseconds of a forward and of a backward pass."""
    fused_TN, heads, documents = inputs["fused_TN"], inputs["heads"], inputs["documents"]
    scores = inputs["scores"]

    def forward() -> tuple[Tensor, str, tuple[Tensor, ...]]:
        return attention_forward(fused_TN, heads, documents, scores=scores, backend=backend)

    output, _, saved = forward()
    grad = torch.randn_like(output)

    def backward() -> Tensor:
        return attention_backward(grad, fused_TN, output, saved, backend, heads, documents, scores=scores)

    return milliseconds(forward), milliseconds(backward)


def _rates(size: Mapping[str, Any], times: tuple[float, float]) -> tuple[float, float]:
    """TFLOP/s of a forward and of a backward pass."""
    work = attention_work(size, 2)[1], attention_backward_work(size, 2)[1]
    forward, backward = (operations / ms / 1e9 for operations, ms in zip(work, times, strict=True))
    return forward, backward


def _line(size: Mapping[str, Any], times: tuple[float, float]) -> str:
    rates = _rates(size, times)
    return "  ".join(
        f"{name} {ms:8.3f} ms {rate:6.1f} TFLOP/s"
        for name, ms, rate in zip(("forward", "backward"), times, rates, strict=True)
    )


def compare(case: str, backends: Sequence[str]) -> Iterator[str]:
    """A line for each backend that fits a case."""
    size = CASES[case]
    inputs = attention_cases(size, torch.bfloat16, torch.device("cuda"))
    wanted = inputs["scores"].within(inputs["documents"])
    for name in backends:
        if not BACKENDS[name].fits(inputs["fused_TN"], inputs["heads"], inputs["documents"], wanted):
            continue
        try:
            yield f"{case:14} {name:13} {_line(size, _time(inputs, name))}"
        except Exception as problem:  # what compilers and libraries raise has no base of its own
            yield f"{case:14} {name:13} {type(problem).__name__}: {str(problem).splitlines()[0][:120]}"


def sweep(case: str, kernels: Sequence[str]) -> Iterator[str]:
    """A line for each candidate of each kernel, and the best."""
    size = CASES[case]
    inputs = attention_cases(size, torch.bfloat16, torch.device("cuda"))
    used = {kernel: blocks_for(kernel, inputs["fused_TN"], inputs["heads"]) for kernel in KERNELS}
    for kernel in kernels:
        which = 0 if kernel == "forward" else 1
        width = next(width for width in CANDIDATES[kernel] if size["head_dim"] <= width)
        current, times = used[kernel], dict[Blocks, float]()
        for shape in CANDIDATES[kernel][width]:
            blocks = Blocks(*shape, shared=0)
            table = {name: {(2, 256): (blocks if name == kernel else used[name],)} for name in KERNELS}
            text = f"{case:14} {kernel:15} {shape!s:18}"
            try:
                with mock.patch.object(attention_blocks, "BLOCKS", table):
                    found = _time(inputs, "triton")
            except Exception as problem:  # more shared memory than there is, or a compiler that gives up
                yield f"{text} {type(problem).__name__}: {str(problem).splitlines()[0][:100]}"
                continue
            times[blocks] = found[which]
            same = current is not None and shape == (
                current.rows, current.columns, current.warps, current.stages
            )  # fmt: skip
            yield f"{text} {_rates(size, found)[which]:6.1f} TFLOP/s {found[which]:8.3f} ms{'  now' * same}"
        if times:
            used[kernel] = best = min(times, key=lambda blocks: times[blocks])
            shape = best.rows, best.columns, best.warps, best.stages
            yield f"{case:14} {kernel:15} {shape!s:18} is best"


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", help=f"some of {', '.join(CASES)}; all by default")
    parser.add_argument("--backends", nargs="+", choices=list(BACKENDS), default=list(BACKENDS))
    parser.add_argument("--sweep", nargs="*", choices=KERNELS, help="kernels whose blocks are tried; all")
    arguments = parser.parse_args(words)
    unknown = [case for case in arguments.cases if case not in CASES]
    if unknown:
        parser.error(f"no such case: {', '.join(unknown)}; there are {', '.join(CASES)}")
    return arguments


def main(words: Sequence[str] | None = None) -> None:
    """Print the lines of the cases that are named."""
    arguments = parse(words)
    for case in arguments.cases or CASES:
        torch.manual_seed(0)
        if arguments.sweep is None:
            lines = compare(case, arguments.backends)
        else:
            lines = sweep(case, arguments.sweep or KERNELS)
        for line in lines:
            print(line, flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
