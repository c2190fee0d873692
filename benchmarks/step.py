"""Tokens per second and peak memory of one whole training step of ours, on a random model of a published shape.

    python benchmarks/step.py --shape 8b --adapter qlora --batch 2x4096 --policy keep recompute

Forward, backward, clipping and AdamW are timed with the loop that training uses; one process a case, median over
the timed steps. `--profile` prints where the GPU's time goes.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import time
from collections import defaultdict
from typing import Any

import torch
from shapes import batch_size, random_model

from tunesmith.contracts.batch import TokenBatch
from tunesmith.distributed.single import SingleDevice
from tunesmith.models.attention import packed_attention
from tunesmith.models.head import CausalModel
from tunesmith.models.install import install
from tunesmith.objectives.sft import SFT
from tunesmith.training.step import ObjectiveLoss, train_step


def documents(rows: int, length: int, mean: int | None, seed: int = 0) -> list[int]:
    """Document lengths of a packed row of rows · length tokens: equal, or random with a given mean."""
    if mean is None:
        return [length] * rows
    rng, total, lengths = random.Random(seed), rows * length, []
    while sum(lengths) < total:
        lengths.append(rng.randint(16, 2 * mean - 16))
    lengths[-1] -= sum(lengths) - total
    return [length for length in lengths if length > 0]


def random_batch(lengths: list[int], share: float, seed: int) -> TokenBatch:
    """A packed row of random tokens, a share of whose positions is supervised."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    ids_T = torch.randint(0, 250, (total,), generator=generator)
    first_T = torch.zeros(total, dtype=torch.bool)
    first_T[torch.tensor([0, *lengths[:-1]]).cumsum(0)] = True
    chosen_T = (torch.rand(total, generator=generator) < share) & ~first_T
    at_S = chosen_T.nonzero().squeeze(1)
    document_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return TokenBatch(
        ids_T=ids_T,
        position_ids_T=torch.cat([torch.arange(length) for length in lengths]),
        lengths=tuple(lengths),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        logit_index_S=at_S - 1,
        targets_S=ids_T[at_S],
        weights_S=torch.ones(at_S.numel()),
        document_S=document_T[at_S],
        rows_D=tuple(range(len(lengths))),
    )


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
    model = random_model(arguments.shape, arguments.adapter, layers=arguments.layers)
    causal = CausalModel(model, torch.bfloat16)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, fused=True)
    backend = SingleDevice(model, optimizer, torch.device("cuda"), torch.bfloat16)
    installed = None if policy == "stock" else install(model, policy=policy)
    loss = ObjectiveLoss(causal, SFT)
    lengths = documents(*arguments.batch, arguments.mean)
    batches = [random_batch(lengths, arguments.supervised, seed) for seed in range(4)]
    model.train()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds, losses = [], []
    with packed_attention(causal.base, "varlen"):
        for number in range(arguments.warm + arguments.steps):
            torch.cuda.synchronize()
            started = time.perf_counter()
            result = train_step(backend, [batches[number % 4]], loss, max_grad_norm=1.0)
            torch.cuda.synchronize()
            if number >= arguments.warm:
                seconds.append(time.perf_counter() - started)
            losses.append(round(result.loss, 4))
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        profile = (
            breakdown(lambda: train_step(backend, [batches[0]], loss, max_grad_norm=1.0))
            if arguments.profile
            else {}
        )
    median = sorted(seconds)[len(seconds) // 2]
    return {
        "name": f"tunesmith {policy}",
        "shape": arguments.shape,
        "adapter": arguments.adapter,
        "documents": len(lengths),
        "tokens": sum(lengths),
        "tokens_per_second": round(sum(lengths) / median),
        "step_seconds": round(median, 4),
        "peak_gib": round(peak / 2**30, 2),
        "reserved_gib": round(reserved / 2**30, 2),
        "host_gib": round(installed.offloader.host_bytes / 2**30, 2) if installed else 0.0,
        "losses": losses[:3] + losses[-1:],
        "fallbacks": dict(installed.fallbacks) if installed else {},
        **profile,
    }


def main() -> None:
    """Run the cases named on the command line, one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--adapter", choices=("lora", "qlora"), default="qlora")
    parser.add_argument("--batch", type=batch_size, default=(2, 4096), help="rows x length, such as 2x4096")
    parser.add_argument("--mean", type=int, help="pack documents of this mean length instead of equal rows")
    parser.add_argument("--supervised", type=float, default=1.0, help="share of positions that train")
    parser.add_argument("--policy", nargs="+", default=["keep"], help="rows of POLICIES, or `stock`")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warm", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    for policy in arguments.policy:
        row = run_case(arguments, policy)
        top = row.pop("top", [])
        print("RESULT", json.dumps(row), flush=True)
        print("\n".join(top), flush=True)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
