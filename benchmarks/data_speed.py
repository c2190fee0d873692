"""Rows a second from a file to packed rows with their mask: ours beside TRL's own preparation, in one run.

    python -m benchmarks.data_speed --model MODEL [--data FILE ...] [--rows 50000]

Both start from the same JSON lines of `{"messages": [...]}` on disk, with the same tokenizer and ChatML, and end
with the tokens packed into rows of `--sequence-length`, the assistant's tokens marked. The data sets given with
`--data` are turned into that form first, outside of the time, because TRL reads no other one of theirs.

- ours: `tokenize_source` into an empty cache (so hashing the file and writing the table are in it), then the rows
  of an epoch from `rows_of_epoch`.
- TRL: `datasets` reads the file, then the `SFTTrainer._prepare_dataset` of a trainer that is never built, with
  `assistant_only_loss` and a ChatML that has `{% generation %}`, packing by `bfd`, in as many processes as there
  are cores and in one; its best is compared. `datasets` gets an empty cache every time.

Every system runs `--repeats` times, in turn, so that other work on the machine meets all of them. The best of each
is compared, because other work only slows; the median and the range are shown beside it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

GENERATION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML as TRL needs it: where the assistant's tokens are, it learns from the template."""

COMMON = (
    "the of and to in is that for it as was with be by on not he this are or his from at which but have an had "
    "they you were there one all we can her has their been if more when will would who so no out up into them "
    "then its about time only could new other some these two may first any my now such like our over man me even "
    "most made after also did many before must through back years where much your way well down should because"
)


@dataclass(frozen=True)
class Measured:
    """Rows a second of each repeat, rows per second of processor time, and the tokens that came out.

    Processor time, children's included, is what a busy machine changes least; a second of the clock on idle cores
    may hold as many of its seconds as there are cores.
    """

    rates: list[float]
    cpu_rates: list[float]
    tokens: int
    trained: int

    @property
    def best(self) -> float:
        return max(self.rates)

    def __str__(self) -> str:
        others = f"{min(self.rates):,.0f}, {statistics.median(self.rates):,.0f}"
        return f"{self.best:,.0f} ({others}; {max(self.cpu_rates):,.0f})"


Prepare = Callable[[Path, Path], tuple[int, int]]
"""From a file of messages, with an empty folder for its cache, to (tokens, tokens that train)."""


def synthetic(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Chats of one to three exchanges with the word counts of an instruction set."""
    rng, words = random.Random(seed), COMMON.split()

    def text(mean: float) -> str:
        return " ".join(rng.choices(words, k=max(3, int(rng.expovariate(1 / mean))))).capitalize() + "."

    for _ in range(count):
        turns = []
        for _ in range(rng.choice((1, 1, 2, 3))):
            turns.append({"role": "user", "content": text(25)})
            turns.append({"role": "assistant", "content": text(70)})
        yield {"messages": turns}


def as_messages(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a data set that are conversations of system, user and assistant, as messages."""
    from tunesmith.data.formats import Conversation, RowProblem, convert
    from tunesmith.data.sources import open_source
    from tunesmith.data.tokenize import find_format

    rows, found = find_format(open_source(path), "auto", {})
    for row in rows:
        try:
            item = convert(found, row.record or {}, {})
        except RowProblem:
            continue
        if isinstance(item, Conversation) and not item.tools:
            turns = [{"role": turn["role"], "content": turn["content"]} for turn in item.messages]
            if all(turn["content"] and turn["role"] != "tool" for turn in turns):
                yield {"messages": turns}


def with_tunesmith(tokenizer: Any, length: int) -> Prepare:
    """Our preparation."""
    import numpy as np

    from tunesmith.data.batches import BatchPlan, Corpus, rows_of_epoch
    from tunesmith.data.render import CHATML, Renderer
    from tunesmith.data.sources import open_source
    from tunesmith.data.tokenize import tokenize_source

    def prepare(path: Path, cache: Path) -> tuple[int, int]:
        renderer = Renderer(tokenizer, CHATML)
        table = tokenize_source(open_source(path), renderer=renderer, sequence_length=length, cache_dir=cache)
        plan = BatchPlan(sequence_length=length, packing=True, rows_per_step=1, tokens_per_step=None, seed=0)
        corpus = Corpus([table])
        rows = rows_of_epoch(corpus, np.arange(len(corpus)), plan, 0)
        assert sum(map(len, rows)) == len(table)
        return table.report.tokens, table.report.trained_tokens

    return prepare


def with_trl(tokenizer: Any, length: int, processes: int | None) -> Prepare:
    """TRL's preparation, as its trainer calls it."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    class Unbuilt(SFTTrainer):
        """Only what `_prepare_dataset` reads of a trainer."""

        def __init__(self) -> None:
            self._tokenizer = tokenizer
            self.chat_template = GENERATION
            self.completion_only_loss = False

    def prepare(path: Path, cache: Path) -> tuple[int, int]:
        options = SFTConfig(
            output_dir=str(cache / "out"),
            max_length=length,
            packing=True,
            assistant_only_loss=True,
            dataset_num_proc=processes,
            use_cpu=True,
            bf16=False,
            report_to=[],
        )
        rows = datasets.load_dataset("json", data_files=str(path), cache_dir=str(cache), split="train")
        done = Unbuilt()._prepare_dataset(rows, tokenizer, options, True, None, "train")
        labels = done.with_format("arrow")["labels"]
        ids = done.with_format("arrow")["input_ids"]
        return _count(ids, lambda _: True), _count(labels, lambda label: label != -100)

    return prepare


def _count(column: Any, wanted: Callable[[int], bool]) -> int:
    import numpy as np
    import pyarrow.compute

    chunks = column.combine_chunks() if hasattr(column, "combine_chunks") else column[:]
    flat = pyarrow.compute.list_flatten(chunks)
    values = flat.to_numpy(zero_copy_only=False)
    return int(values.size) if wanted(-100) else int(np.count_nonzero(values != -100))


def measure(systems: dict[str, Prepare], path: Path, rows: int, repeats: int) -> dict[str, Measured]:
    """Rates of every system on one file; the systems take turns."""
    rates: dict[str, list[float]] = {name: [] for name in systems}
    cpu_rates: dict[str, list[float]] = {name: [] for name in systems}
    counts: dict[str, tuple[int, int]] = {}
    for _ in range(repeats):
        for name, prepare in systems.items():
            cache = Path(tempfile.mkdtemp(prefix="data-speed-"))
            started, cpu = time.perf_counter(), sum(os.times()[:4])
            counts[name] = prepare(path, cache)
            rates[name].append(rows / (time.perf_counter() - started))
            cpu_rates[name].append(rows / (sum(os.times()[:4]) - cpu))
            shutil.rmtree(cache)
            print(f"{path.stem} · {name} · {rates[name][-1]:,.0f} rows/s", file=sys.stderr)
    return {name: Measured(rates[name], cpu_rates[name], *counts[name]) for name in systems}


def table(results: dict[str, tuple[int, dict[str, Measured]]]) -> str:
    """The figures as a Markdown table."""
    names = list(next(iter(results.values()))[1])
    lines = [
        f"| data | rows | tokens, trained | {' | '.join(f'{name} rows/s' for name in names)} | ours / best of TRL |",
        f"| --- | --- | --- |{' --- |' * (len(names) + 1)}",
    ]
    for data, (rows, measured) in results.items():
        ours, *others = measured.values()
        cells = [str(one) for one in measured.values()]
        ratio = ours.best / max(other.best for other in others) if others else float("nan")
        lines.append(
            f"| {data} | {rows:,} | {ours.tokens:,}, {ours.trained:,} | {' | '.join(cells)} | {ratio:.1f}× |"
        )
        for name, other in measured.items():
            if (other.tokens, other.trained) != (ours.tokens, ours.trained):
                lines.append(f"\n{data}, {name}: {other.tokens:,} tokens, {other.trained:,} trained on")
    return "\n".join(lines)


def versions() -> str:
    """Python, cores and the packages that do the work."""
    packages = ("tunesmith", "trl", "transformers", "tokenizers", "datasets")
    listed = []
    for package in packages:
        try:
            listed.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"{os.cpu_count()} cores, Python {platform.python_version()}, {', '.join(listed)}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or hub id of the tokenizer")
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="data sets to measure on as well")
    parser.add_argument("--rows", type=int, default=50_000, help="rows of the synthetic set; 0 leaves it out")
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--without-trl", action="store_true", help="ours alone, for profiles")
    options = parser.parse_args()

    from transformers import AutoTokenizer

    from tunesmith.training.quiet import quiet_libraries

    quiet_libraries()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    systems = {"ours": with_tunesmith(tokenizer, options.sequence_length)}
    if not options.without_trl:
        systems["TRL, 1 process"] = with_trl(tokenizer, options.sequence_length, None)
        cores = os.cpu_count() or 1
        systems[f"TRL, {cores} processes"] = with_trl(tokenizer, options.sequence_length, cores)
    results: dict[str, tuple[int, dict[str, Measured]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        sets = {f"{path.parent.name}-{path.stem}": as_messages(path) for path in options.data}
        if options.rows:
            sets["synthetic"] = synthetic(options.rows)
        for name, rows in sets.items():
            path, count = Path(folder) / f"{name}.jsonl", 0
            with path.open("w", encoding="utf-8") as stream:
                for row in rows:
                    stream.write(json.dumps(row, ensure_ascii=False) + "\n")
                    count += 1
            results[name] = (count, measure(systems, path, count, options.repeats))
    print(f"{versions()}; packs of {options.sequence_length}, best of {options.repeats}")
    print("rows a second of the clock (worst, median; rows per second of processor time)\n")
    print(table(results))


if __name__ == "__main__":
    main()
