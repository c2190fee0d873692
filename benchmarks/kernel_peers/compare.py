"""Runs each system's process over the same cases, and makes the table of what they said."""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.kernel_peers.rows import ROWS
from benchmarks.kernel_peers.worker import UNUSABLE
from benchmarks.peers.processes import find_card, run_process
from tunesmith._version import __version__

OURS = "tunesmith"
PEERS = {"torch": "torch", "liger": "Liger", "unsloth": "Unsloth", "bitsandbytes": "bitsandbytes"}
"""Name on the command line, and in the table."""

ENVIRONMENT = {"UNSLOTH_DISABLE_STATISTICS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
RESTARTS = 6
"""Processes a peer gets at most: one that dies is started again behind the case that ended it."""

NOTES = (
    "Milliseconds of the card, median of 20 calls on an emptied cache, the host's own time hidden.",
    "torch: our references, one operation after the other, in float32 inside.",
    "Peers get q and k, and gate and up, as tensors of their own; ours works on the fused buffers.",
    "`rank`: with the products of the adapters, which our kernel fuses; the rows without it compare like with like.",
    "`rms_norm` with `residual` and its backward with `add`: fused in ours and Liger's; with Unsloth the addition is "
    "torch's.",
    "`glu_backward_`: ours and Unsloth's give the forward's result again besides both gradients, Liger's does not.",
    "`softmax_gradient_`: log-probability and gradient in one pass over the logits in ours and Liger's, forward and "
    "backward with Unsloth. Liger checks its targets on the host, which is in its time.",
    "`dequantize_nf4`: peers write new matrices without padding, ours a buffer that is there.",
)

Job = tuple[str, dict[str, Any]]
Cell = Mapping[str, Any]
"""`ms` of a case, or the `reason` why there is none."""


def _why(status: int | None, log: Path, limit: float) -> str:
    if status is None:
        return f"its {limit:.0f} s were over"
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else f"its process ended with status {status}"


def _answers(file: Path) -> list[dict[str, Any]]:
    """Complete lines of a process's answers."""
    if not file.is_file():
        return []
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:  # cut off where the process was ended
            break
    return found


def run_peer(
    peer: str, jobs: Sequence[Job], device: str, folder: Path, limit: float
) -> tuple[list[Cell], dict[str, Any]]:
    """Time every job in processes of the peer.

    Args:
        limit: seconds for all of them together.

    Returns:
        A cell for each job; versions (and for our own process the bandwidth of copying), empty where the peer
        could not be imported.
    """
    cells: list[Cell] = [{"reason": "its processes ended too often"}] * len(jobs)
    about: dict[str, Any] = {}
    start, deadline = 0, time.monotonic() + limit
    for attempt in range(RESTARTS):
        file, log = folder / f"{peer}-{attempt}.jsonl", folder / f"{peer}-{attempt}.log"
        rest = json.dumps(jobs[start:])
        status = run_process(
            ["-m", "benchmarks.kernel_peers.worker", peer, str(file), device, rest],
            log,
            max(1.0, deadline - time.monotonic()),
            ENVIRONMENT,
            folder,
        )
        first, *answers = _answers(file) or [{}]
        about = about or first
        for answer in answers:
            cells[start + answer["job"]] = answer
        start += len(answers)
        reason = {"reason": _why(status, log, limit)}
        if status is None or not first:  # its time is up, or it cannot be imported
            cells[start:] = [reason] * (len(jobs) - start)
            break
        if status != UNUSABLE and start < len(jobs):  # else the case that ended it has its answer
            cells[start] = reason
            start += 1
        if start == len(jobs):
            break
    return cells, about


@dataclass(frozen=True)
class Comparison:
    """What was measured.

    Attributes:
        jobs: the cases.
        cells: by system, `tunesmith` first, one cell for each case.
        card: what computed.
        versions: of every package that took part.
        copy: bytes a second that copying moves, None on a CPU.
        date: of the measurement.
    """

    jobs: Sequence[Job]
    cells: Mapping[str, Sequence[Cell]]
    card: str
    versions: Mapping[str, str]
    copy: float | None
    date: str

    def lines(self) -> Iterator[str]:
        """The table with what belongs to it, as lines of Markdown."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        copy = f"; copy {self.copy / 1e12:.2f} TB/s" if self.copy else ""
        yield f"{self.card}, {self.date}; {versions}{copy}."
        yield ""
        yield from self._table()
        yield ""
        yield from (f"- {note}" for note in NOTES)
        yield from self._reasons()

    def _table(self) -> Iterator[str]:
        heads = ["tunesmith ms", *(f"{PEERS[peer]} ms" for peer in self.cells if peer != OURS)]
        yield "| kernel | size | " + " | ".join([*heads, "ours, share of copy"]) + " |"
        yield "| --- | --- |" + " --- |" * (len(heads) + 1)
        for number, (name, size) in enumerate(self.jobs):
            cells = [column[number] for column in self.cells.values()]
            figures = [f"{cell['ms']:.3f}" if "ms" in cell else "-" for cell in cells]
            yield f"| {name} | {size_text(size)} | " + " | ".join([*figures, self._share(number)]) + " |"

    def _share(self, number: int) -> str:
        name, size = self.jobs[number]
        took, moved = self.cells[OURS][number].get("ms"), ROWS[name].cost(size, 2).bytes
        if self.copy is None or took is None or not moved:
            return "-"
        return f"{moved / self.copy * 1e3 / took:.0%}"

    def _reasons(self) -> Iterator[str]:
        """One line for each reason of a system; a kernel that it holds for at every size goes without sizes."""
        for peer, cells in self.cells.items():
            places: dict[str, list[Job]] = defaultdict(list)
            for job, cell in zip(self.jobs, cells, strict=True):
                if "reason" in cell:
                    places[cell["reason"]].append(job)
            for reason, missing in places.items():
                everywhere = "" if len(missing) == len(self.jobs) else f" for {self._where(missing)}"
                yield f"- No figure of {PEERS.get(peer, peer)}{everywhere}: {reason}."

    def _where(self, missing: Sequence[Job]) -> str:
        counts, lost = (Counter(name for name, _ in jobs) for jobs in (self.jobs, missing))
        whole = [name for name in lost if lost[name] == counts[name]]
        single = [f"{name} ({size_text(size)})" for name, size in missing if name not in whole]
        return "; ".join([*whole, *single])


def size_text(size: Mapping[str, Any]) -> str:
    """A size in words: `tokens 8192, width 4096, residual`."""
    words = (key if value is True else f"{key} {value}" for key, value in size.items() if value is not False)
    return ", ".join(words)


def compare(
    jobs: Sequence[Job], peers: Sequence[str], device: str, folder: Path, limit: float
) -> Iterator[Comparison]:
    """Time every job with our kernels and those of the peers, one process after the other.

    Args:
        peers: of `PEERS`.
        device: `cuda` or `cpu`.
        folder: for logs and answers.
        limit: seconds for a system.

    Yields:
        What is known after each system.
    """
    cells: dict[str, Sequence[Cell]] = {}
    versions = {"tunesmith": __version__}
    copy = None
    card = find_card().name if device == "cuda" else "CPU"
    for system in (OURS, *peers):
        cells[system], about = run_peer(system, jobs, device, folder, limit)
        versions |= about.get("versions", {})
        copy = copy or about.get("copy")
        yield Comparison(jobs, dict(cells), card, versions, copy, datetime.now(UTC).date().isoformat())
