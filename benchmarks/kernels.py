"""Milliseconds and share of the memory roofline of every kernel in the catalog, at the sizes of real models.

    python benchmarks/kernels.py [NAME ...] [--set glu.ADAPTER_ROWS=32]
    python benchmarks/kernels.py [NAME ...] --peers [torch liger unsloth bitsandbytes] [--out kernels.md]

Inputs are made once and the kernels run in place on them, so values drift; times do not depend on them. With
`--peers` the same cases go through other systems' kernels, each system in a process of its own, and a Markdown table
is printed; what has no figure has its reason below the table. `--small` takes the sizes of the tests, for a CPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

if __name__ == "__main__":  # as a script: the root of the project instead of this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.kernel_peers.compare import PEERS, compare
from benchmarks.kernel_peers.rows import ROWS
from benchmarks.timing import copy_bandwidth, milliseconds
from tunesmith.kernels.catalog import CATALOG


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="rows of the catalog; all by default")
    parser.add_argument(
        "--set", action="append", default=[], help="MODULE.CONSTANT=VALUE of tunesmith.kernels"
    )
    parser.add_argument(
        "--peers", nargs="*", choices=PEERS, help="compare with these; all where none is named"
    )
    parser.add_argument("--small", action="store_true", help="sizes of the tests")
    parser.add_argument("--limit", type=float, default=150.0, help="seconds for a system")
    parser.add_argument("--out", type=Path, help="file for the table as well")
    arguments = parser.parse_args(words)
    unknown = [name for name in arguments.names if name not in ROWS]
    if unknown:
        parser.error(f"no such kernel: {', '.join(unknown)}; there are {', '.join(ROWS)}")
    if arguments.set and arguments.peers is not None:
        parser.error("--set reaches this process only, and --peers measures in others")
    return arguments


def print_own_times(names: Sequence[str]) -> None:
    """One line for each case of our own kernels."""
    copy = copy_bandwidth()
    print(f"copy {copy / 1e12:.2f} TB/s")
    for name in names:
        row = ROWS[name]
        for size in row.large:
            torch.manual_seed(0)
            inputs = row.cases(size, torch.bfloat16, torch.device("cuda"))
            took = milliseconds(lambda row=row, inputs=inputs: row.op(**inputs))
            floor = row.cost(size, 2).bytes / copy * 1e3
            print(
                f"{name:20} {took:8.3f} ms  {floor / took:6.1%} of copy  {json.dumps(dict(size))}", flush=True
            )
            del inputs
            torch.cuda.empty_cache()


def print_comparison(arguments: argparse.Namespace) -> None:
    """Run the peers over the cases that the command line names; `--out` is written after each of them."""
    jobs = [
        (name, dict(size))
        for name in arguments.names or ROWS
        for size in (ROWS[name].small if arguments.small else ROWS[name].large)
    ]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    text = ""
    with tempfile.TemporaryDirectory(prefix="kernel-peers-") as folder:
        for found in compare(jobs, arguments.peers or list(PEERS), device, Path(folder), arguments.limit):
            text = "\n".join(found.lines())
            system, cells = list(found.cells.items())[-1]
            print(
                f"{system}: {sum('ms' in c for c in cells)} of {len(cells)} cases",
                file=sys.stderr,
                flush=True,
            )
            if arguments.out is not None:
                arguments.out.write_text(text + "\n", encoding="utf-8")
    print(text)


def main(words: Sequence[str] | None = None) -> None:
    """Time our kernels, or compare them."""
    arguments = parse(words)
    for change in arguments.set:
        name, _, value = change.partition("=")
        module, _, constant = name.partition(".")
        setattr(importlib.import_module(f"tunesmith.kernels.{module}"), constant, int(value))
    if arguments.peers is None:
        print_own_times(arguments.names or list(CATALOG))
        return
    print_comparison(arguments)


if __name__ == "__main__":
    main()
