"""Times us and every installed peer on the same work, resumable in pieces: rows of results, a table, the bars.

    python benchmarks/compare.py                                      measure what is missing, for 9 minutes
    python benchmarks/compare.py --systems 'tunesmith*' --cases 8b-qlora
    python benchmarks/compare.py --table                              the results as Markdown
    python benchmarks/compare.py --bars                               which bars hold

One process for each system and case, so that nothing that one system patches, caches or allocates reaches another.
A failure is a result too: out of memory, a crash, a timeout. Start the same command again and it goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import fnmatch
import importlib.util
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as a script: the root of the project instead of this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import shapes
from benchmarks.peers.flops import H100_TFLOPS
from benchmarks.peers.processes import Card, find_card, run_process
from benchmarks.peers.report import bars, table
from benchmarks.peers.tables import CASES, SYSTEMS, Case, System, Work

ROOT = Path(__file__).resolve().parent.parent

PATIENCE = 3
"""A process may take so many times what is expected before it is ended."""

SPARE = 0.01
"""Share that a plan leaves of another system's peak: forecasts are off by as much."""

Record = dict[str, Any]


class Results:
    """The file of results: one JSON object a line, appended to and never rewritten.

    Args:
        folder: holds `results.jsonl` and `logs/`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "results.jsonl"

    def read(self) -> list[Record]:
        """All rows, oldest first; a last line that was cut off is left out."""
        if not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1] if line]

    def append(self, record: Record) -> None:
        """Add a row, and end a line that was cut off before it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.path.is_file():
            text = self.path.read_text(encoding="utf-8")
            if text and not text.endswith("\n"):
                self.path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def missing_packages(case: Case, system: System) -> list[str]:
    """Packages that the system lacks for this case; nothing is imported."""
    needs = {*system.needs, "torch", "transformers", "peft"}
    if case.adapter in ("qlora", "full"):
        needs.add("bitsandbytes")
    return sorted(name for name in needs if importlib.util.find_spec(name) is None)


@dataclass(frozen=True, slots=True)
class Job:
    """One process to start."""

    case_name: str
    system_name: str
    case: Case
    system: System
    config: Mapping[str, Any]
    checkpoint: Path

    @property
    def weights(self) -> str:
        """What is loaded: the shape and how its weights are held."""
        return f"{self.checkpoint.name}-{self.case.adapter}"

    @property
    def name(self) -> str:
        """As logs are called."""
        return f"{self.case_name}.{self.system_name}"

    def budget(self, records: Sequence[Record], card: str) -> float | None:
        """GiB that a plan may use within another system's peak; None where that has not been measured."""
        peaks = [
            record["peak_gib"]
            for record in records
            if (record["case"], record["system"], record["card"], record["status"])
            == (self.case_name, self.system.within, card, "ok")
        ]
        return (1 - SPARE) * float(peaks[-1]) if peaks else None

    def work(self, budget: float | None = None) -> Work:
        """What its process measures.

        Args:
            budget: GiB that it may use, where the table does not say.
        """
        case = self.case
        return Work(
            config=dict(self.config),
            checkpoint=str(self.checkpoint),
            adapter=case.adapter,
            rows=case.rows,
            length=case.length,
            mean=case.mean,
            supervised=case.supervised,
            steps=case.steps,
            warm=case.warm,
            layouts=list(self.system.layouts(case)),
            options=dict(self.system.options) | ({} if budget is None else {"budget": budget}),
        )

    def expected(self, records: Sequence[Record]) -> float:
        """Seconds it is likely to take: the longest that the system took with these weights, or the table's."""
        took = [
            record["wall_seconds"]
            for record in records
            if (record["system"], record["weights"], record["status"])
            == (self.system_name, self.weights, "ok")
        ]
        return float(max(took, default=self.case.expected))

    def checkpoint_seconds(self) -> float:
        """Seconds that writing its checkpoint is likely to take, 0 where it stands."""
        if self.checkpoint.is_dir():
            return 0.0
        return 30 + 3 * 2 * shapes.parameters(dict(self.config)) / 1e9


def plan(
    case_patterns: Sequence[str], system_patterns: Sequence[str], checkpoints: Path, layers: int | None
) -> list[Job]:
    """The jobs named by patterns, case after case, each case in the order of its systems.

    Raises:
        SystemExit: a pattern names nothing.
    """
    for patterns, rows, what in ((case_patterns, CASES, "case"), (system_patterns, SYSTEMS, "system")):
        for pattern in patterns:
            if not fnmatch.filter(rows, pattern):
                raise SystemExit(f"There is no {what} {pattern!r}; there are: {', '.join(rows)}.")
    jobs = []
    for case_name, case in CASES.items():
        if not any(fnmatch.fnmatchcase(case_name, pattern) for pattern in case_patterns):
            continue
        config, folder = shapes.SHAPES[case.shape], case.shape
        if layers:
            case, case_name = dataclasses.replace(case, layers=layers), f"{case_name}-{layers}layers"
        if case.layers:
            config, folder = config | {"num_hidden_layers": case.layers}, f"{folder}-{case.layers}layers"
        jobs += [
            Job(case_name, name, case, SYSTEMS[name], config, checkpoints / folder)
            for name in case.systems
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in system_patterns)
        ]
    return jobs


def _failure(code: int | None, log: Path, limit: float) -> Record:
    """What became of a process that did not give all its rows."""
    text = log.read_text(encoding="utf-8", errors="replace")
    last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")
    if code is None:
        return {"status": "timeout", "reason": f"took longer than {limit:.0f} s; last line: {last[:160]}"}
    if "out of memory" in text.lower():
        return {"status": "oom", "reason": last[:200]}
    ended = f"signal {-code}" if code < 0 else f"exit status {code}"
    return {"status": "crash", "reason": f"{ended}: {last[:200]}"}


def measure(
    job: Job, results: Results, card: Card, sitting: str, limit: float, *, whole: bool
) -> list[Record]:
    """Run a job's process and record what comes of it, one row for each of its layouts.

    Args:
        limit: seconds after which it is ended.
        whole: whether that is all the time it gets; otherwise nothing is recorded of a job that was ended.
    """
    log = results.folder / "logs" / f"{job.name}.log"
    rows_file = results.folder / "work" / f"{job.name}.jsonl"
    rows_file.parent.mkdir(parents=True, exist_ok=True)
    rows_file.write_text("", encoding="utf-8")
    work = job.work(job.budget(results.read(), card.name))
    started = time.monotonic()
    code = run_process(
        [
            "-m",
            "benchmarks.peers.worker",
            job.system.module,
            str(rows_file),
            json.dumps(dataclasses.asdict(work)),
        ],
        log,
        limit,
        job.system.environment,
        results.folder / "work",
    )
    took = round(time.monotonic() - started, 1)
    if code is None and not whole:
        return []
    rows = [json.loads(line) for line in rows_file.read_text(encoding="utf-8").splitlines()]
    given = {row["layout"] for row in rows}
    rows += [
        {"layout": layout, **_failure(code, log, limit)} for layout in work.layouts if layout not in given
    ]
    about = {
        "system": job.system_name,
        "case": job.case_name,
        "title": job.case.title,
        "weights": job.weights,
        "card": card.name,
        "driver": card.driver,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "sitting": sitting,
        "kind": job.system.kind,
        "wall_seconds": took,
    }
    records = [about | row for row in rows]
    for record in records:
        results.append(record)
    return records


def write_checkpoint(job: Job, results: Results, limit: float) -> str | None:
    """Write the weights that all systems load; None, or why it failed."""
    log = results.folder / "logs" / f"checkpoint.{job.checkpoint.name}.log"
    code = run_process(
        ["-m", "benchmarks.shapes", str(job.checkpoint), json.dumps(dict(job.config))],
        log,
        limit,
        {},
        results.folder / "work",
    )
    return None if job.checkpoint.is_dir() else str(_failure(code, log, limit)["reason"])


def _say(record: Record) -> None:
    name = f"{record['case']:18} {record['system']} ({record['layout']})"
    if record["status"] == "ok":
        figures = f"{record['tokens_per_second']:>8,} tokens/s {record['peak_gib']:6.2f} GiB"
    else:
        figures = f"{record['status']}: {record['reason']}"
    print(f"{name:58} {figures}  [{record['wall_seconds']:.0f} s]", flush=True)


def run_all(jobs: Sequence[Job], results: Results, card: Card, budget: float, again: bool) -> int:
    """Measure what is missing as far as the budget reaches; how many jobs are left.

    Args:
        budget: seconds from now.
        again: measure also what has results.
    """
    deadline = time.monotonic() + budget
    sitting = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    records = results.read()
    done = {(r["case"], r["system"]) for r in records if r["card"] == card.name and not again}
    lacking: dict[str, list[str]] = {}
    todo = []
    for job in jobs:
        if missing := missing_packages(job.case, job.system):
            lacking.setdefault(", ".join(missing), []).append(job.system_name)
        elif (job.case_name, job.system_name) not in done:
            todo.append(job)
    for packages, names in lacking.items():
        print(f"not installed: {packages}; left out: {', '.join(dict.fromkeys(names))}", flush=True)
    left, unwritten = list(todo), set()
    for job in todo:
        remaining = deadline - time.monotonic()
        if job.checkpoint_seconds() + job.expected(records) > remaining:
            continue  # a shorter job further on may still fit
        if job.system.within and job.budget(results.read(), card.name) is None:
            print(f"{job.name}: {job.system.within} has to be measured first, for its peak", flush=True)
            continue
        if job.checkpoint in unwritten:
            continue
        if not job.checkpoint.is_dir():
            problem = write_checkpoint(job, results, remaining)
            if problem:
                print(f"the checkpoint {job.checkpoint.name} could not be written: {problem}", flush=True)
                unwritten.add(job.checkpoint)
                continue
            remaining = deadline - time.monotonic()
        patience = PATIENCE * max(job.expected(records), job.case.expected)
        whole = patience <= remaining or len(left) == len(todo)
        rows = measure(job, results, card, sitting, min(patience, remaining), whole=whole)
        for record in rows:
            _say(record)
        if rows:
            left.remove(job)
    return len(left)


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "compare", help="folder of the results")
    parser.add_argument("--checkpoint", type=Path, help="folder of the weights; checkpoints/ in --out")
    parser.add_argument("--systems", nargs="+", default=["*"], metavar="PATTERN", help="rows of SYSTEMS")
    parser.add_argument("--cases", nargs="+", default=["*"], metavar="PATTERN", help="rows of CASES")
    parser.add_argument(
        "--budget", type=float, default=540, help="start nothing that would end later, seconds"
    )
    parser.add_argument("--again", action="store_true", help="measure also what has results")
    parser.add_argument("--layers", type=int, help="fewer layers, to see in a minute whether all systems run")
    parser.add_argument("--list", action="store_true", help="print what would run")
    parser.add_argument("--table", action="store_true", help="print the results as Markdown")
    parser.add_argument("--bars", action="store_true", help="print which bars hold")
    parser.add_argument("--tflops", type=float, default=H100_TFLOPS, help="bfloat16 GEMM rate of the card")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, or print what was measured."""
    arguments = arguments_of(argv)
    results = Results(arguments.out.resolve())
    if arguments.table or arguments.bars:
        records = results.read()
        if arguments.table:
            print(table(records, arguments.tflops))
        if arguments.bars:
            print(bars(records))
        return 0
    checkpoints = (arguments.checkpoint or arguments.out / "checkpoints").resolve()
    jobs = plan(arguments.cases, arguments.systems, checkpoints, arguments.layers)
    if arguments.list:
        for job in jobs:
            print(f"{job.case_name:18} {job.system_name:28} {' '.join(job.system.layouts(job.case))}")
        return 0
    card = find_card()
    print(f"{card.name}; results in {results.path}", flush=True)
    left = run_all(jobs, results, card, arguments.budget, arguments.again)
    print(f"{left} of {len(jobs)} left; the same command goes on." if left else "Nothing is left to measure.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
