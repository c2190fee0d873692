"""Milliseconds and share of the memory roofline of every kernel in the catalog, at the sizes of real models.

    python benchmarks/kernels.py [NAME ...] [--set glu.ADAPTER_ROWS=32]

Inputs are made once and the kernels run in place on them, so values drift; times do not depend on them.
"""

from __future__ import annotations

import argparse
import importlib
import json

import torch

from tunesmith.kernels.catalog import CATALOG

COPY_BYTES_PER_SECOND = 2.99e12
"""Measured copy bandwidth of an H100 80GB; reads and writes counted."""


def milliseconds(call, repeats: int = 20) -> float:
    """Median time of a call by device events, after a warm-up."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def main() -> None:
    """Time the rows named on the command line, or all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=list(CATALOG))
    parser.add_argument(
        "--set", action="append", default=[], help="MODULE.CONSTANT=VALUE of tunesmith.kernels"
    )
    arguments = parser.parse_args()
    for change in arguments.set:
        name, _, value = change.partition("=")
        module, _, constant = name.partition(".")
        setattr(importlib.import_module(f"tunesmith.kernels.{module}"), constant, int(value))
    for name in arguments.names or CATALOG:
        row = CATALOG[name]
        for size in row.large:
            torch.manual_seed(0)
            inputs = row.cases(size, torch.bfloat16, torch.device("cuda"))
            took = milliseconds(lambda row=row, inputs=inputs: row.op(**inputs))
            floor = row.cost(size, 2).bytes / COPY_BYTES_PER_SECOND * 1e3
            print(
                f"{name:20} {took:8.3f} ms  {floor / took:6.1%} of copy  {json.dumps(dict(size))}", flush=True
            )
            del inputs
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
