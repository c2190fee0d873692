"""The process that times one system.

    python -m benchmarks.kernel_peers.worker PEER RESULTS DEVICE JOBS        JOBS is JSON: [[name, size], ...]

Answers go to the file RESULTS as they come. Nothing heavy is imported at the top, so that a peer imports what it
wants first (Unsloth patches what is loaded after it).
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers.worker import versions

TOLERANCE = 2e-2
"""Largest relative error of a peer that is said to compute the same. Peers round at other places, in bfloat16 up to
three times (3 · 2^-9, and room); another computation is off by its whole size."""

UNUSABLE = 3
"""Exit status after an error that leaves the device unusable for this process."""


def time_job(peer: Any, name: str, size: dict[str, Any], device_name: str) -> dict[str, Any]:
    """Check one case against our reference and time it.

    Returns:
        `ms`, or `reason` where there is none.
    """
    import torch

    from benchmarks.kernel_peers.rows import ROWS, NotComparableError, named, refuse_more
    from benchmarks.timing import milliseconds
    from tunesmith.kernels.measure import copied, error, results

    if name not in peer.PEER:
        return {"reason": "has no such kernel of its own"}
    device = torch.device(device_name)
    row = ROWS[name]
    torch.manual_seed(0)
    inputs = row.cases(size, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    try:
        if not getattr(peer, "OWN", False):
            refuse_more(name, size)
        exact = named(name, size, results(row.reference, row, copied(inputs)))
        prepared = peer.PEER[name](size, inputs)
        found = prepared.read(prepared.run())
    except NotComparableError as refusal:
        return {"reason": str(refusal)}
    worst = max(error(found[key], exact[key]) for key in exact)
    if not worst <= TOLERANCE:
        return {"reason": f"its result is off by {worst:.2g}, so it computes something else"}
    del exact, found
    return {"ms": milliseconds(prepared.run, device), "error": worst}


def _usable(device: str) -> bool:
    """Whether the device still computes; gives back what the last job held there."""
    import torch

    if device == "cpu":
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    torch.cuda.empty_cache()
    return True


def _about(peer_name: str, device: str) -> dict[str, Any]:
    """Versions; from our own process the bandwidth that shares are shares of as well."""
    if peer_name != "tunesmith" or device == "cpu":
        return {"versions": versions()}
    import torch

    from benchmarks.timing import copy_bandwidth

    return {"versions": versions(), "copy": copy_bandwidth(torch.device(device))}


def main(peer_name: str, results: str, device: str, jobs: str) -> None:
    """Time every job and write one line for each, after a line of versions."""
    peer = importlib.import_module(f"benchmarks.kernel_peers.with_{peer_name}")
    with Path(results).open("a", encoding="utf-8") as file:
        print(json.dumps(_about(peer_name, device)), file=file, flush=True)
        for number, (name, size) in enumerate(json.loads(jobs)):
            try:
                answer = time_job(peer, name, size, device)
            except Exception as failure:  # whatever a peer raises becomes a cell without a figure
                first = (str(failure).strip().splitlines() or [""])[0]
                answer = {"reason": f"{type(failure).__name__}: {first[:160]}"}
            print(json.dumps({"job": number, **answer}), file=file, flush=True)
            if not _usable(device):
                sys.exit(UNUSABLE)


if __name__ == "__main__":
    main(*sys.argv[1:])
