"""Tokens per second and peak memory of one whole training step of ours, on a random model of a published shape.

    python benchmarks/step.py --shape 8b --adapter qlora --batch 2x4096 --policy keep recompute

Forward, backward, clipping and AdamW (in 8 bits where all weights train) are timed with the loop that training uses;
one process a case, median over the timed steps. `--profile` prints where the GPU's time goes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":  # as a script: the root of the project instead of this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.batches import documents, random_batch
from benchmarks.loop import release, time_steps
from benchmarks.peers.with_tunesmith import report, training_step
from benchmarks.shapes import batch_size, device_and_dtype, random_model

KINDS = (
    ("attention", ("flash", "sdpa", "fmha", "cudnn_generated")),
    ("GEMM", ("gemm", "nvjet", "cutlass", "xmma", "cublas", "s16816")),
    ("ours", ("_kernel",)),
    ("copy", ("memcpy", "memset")),
)


def breakdown(step: Any) -> dict[str, Any]:
    """GPU milliseconds of one step by kind of kernel, the gaps between kernels, and the largest kernels."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        step()
        torch.cuda.synchronize()
    kernels = [e for e in profiler.events() if e.device_type.name == "CUDA"]
    by_kind: dict[str, float] = defaultdict(float)
    by_name: dict[str, list[float]] = defaultdict(list)
    for event in kernels:
        name, milliseconds = event.name, event.time_range.elapsed_us() / 1e3
        kind = next((k for k, words in KINDS if any(w in name.lower() for w in words)), "elementwise")
        by_kind[kind] += milliseconds
        by_name[name[:90]].append(milliseconds)
    span = max(e.time_range.end for e in kernels) - min(e.time_range.start for e in kernels)
    top = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:24]
    return {
        "ms": {k: round(v, 2) for k, v in by_kind.items()}
        | {"gaps": round(span / 1e3 - sum(by_kind.values()), 2)},
        "kernels": len(kernels),
        "top": [f"{sum(times):8.2f} ms {len(times):5d} x {name}" for name, times in top],
    }


def run_case(arguments: argparse.Namespace, policy: str) -> dict[str, Any]:
    """Build the model, warm up, time, and return a row of results."""
    device, dtype = device_and_dtype()
    model = random_model(arguments.shape, arguments.adapter, layers=arguments.layers)
    lengths = documents(*arguments.batch, arguments.mean)
    batches = [random_batch(lengths, arguments.supervised, seed) for seed in range(4)]
    graphs = {"auto": None, "always": True, "never": False}[arguments.graphs]
    with training_step(
        model, policy, device, dtype, tokens=sum(lengths), adapter=arguments.adapter, graphs=graphs
    ) as (step, installed):
        timing = time_steps(
            lambda number: step(batches[number % 4]),
            steps=arguments.steps,
            warm=arguments.warm,
            device=device,
        )
        profile = breakdown(lambda: step(batches[0])) if arguments.profile else {}
    return {
        "name": f"tunesmith {policy}",
        "shape": arguments.shape,
        "adapter": arguments.adapter,
        "documents": len(lengths),
        "tokens": sum(lengths),
        **timing.row(sum(lengths)),
        **report(installed),
        **profile,
    }


def main() -> None:
    """Run the cases named on the command line, one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--adapter", choices=("lora", "qlora", "full"), default="qlora")
    parser.add_argument("--batch", type=batch_size, default=(2, 4096), help="rows x length, such as 2x4096")
    parser.add_argument("--mean", type=int, help="pack documents of this mean length instead of equal rows")
    parser.add_argument("--supervised", type=float, default=1.0, help="share of positions that train")
    parser.add_argument("--policy", nargs="+", default=["keep"], help="rows of POLICIES, or `stock`")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warm", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--graphs", choices=("auto", "always", "never"), default="auto", help="CUDA graphs")
    arguments = parser.parse_args()
    for policy in arguments.policy:
        row = run_case(arguments, policy)
        top = row.pop("top", [])
        print("RESULT", json.dumps(row), flush=True)
        print("\n".join(top), flush=True)
        release(device_and_dtype()[0])


if __name__ == "__main__":
    main()
