"""The process that measures one system at one case.

    python -m benchmarks.peers.worker MODULE RESULTS WORK        WORK is JSON

Rows go to the file RESULTS as they come; what libraries print stays out of it. Nothing heavy is imported here,
so that each system imports what it wants first (Unsloth patches what is loaded after it).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import platform
import sys
from pathlib import Path

from benchmarks.peers.tables import Work

PACKAGES = (
    "torch", "triton", "transformers", "peft", "bitsandbytes", "accelerate", "unsloth", "unsloth_zoo", "trl",
    "liger_kernel", "nvidia-cudnn-frontend",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of what decides speed, as far as installed, and torch's CUDA."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    torch = sys.modules.get("torch")
    if torch is not None and torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def main(module: str, results: str, work: str) -> None:
    """Measure and write rows."""
    system = importlib.import_module(module)
    with Path(results).open("a", encoding="utf-8") as file:
        for row in system.measure(Work(**json.loads(work))):
            print(json.dumps(row | {"versions": versions()}), file=file, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
