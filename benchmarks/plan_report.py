"""What `plans.py` measured, beside what was foreseen: tables, a byte account of more layers, and a picture."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.tables import OPTIMIZERS, TITLES
from benchmarks.planned import GIB, card_name, facts_of, plan_step, work_of

Record = dict[str, Any]

SAME = ("card", "shape", "adapter", "optimizer", "rows", "length", "mean", "supervised")
"""Fields by which rows are one piece of work."""


def append(path: Path, record: Record) -> None:
    """Add a row to a file of results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read(path: Path) -> list[Record]:
    """The last row of each layout, in the order in which they were first measured."""
    found: dict[tuple[Any, ...], Record] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found[tuple(row[name] for name in (*SAME, "layers", "asked", "embedding"))] = row
    return list(found.values())


def off(found: float, foreseen: float) -> str:
    """By how much a forecast was off what was found: `+1.2%` where it said too much."""
    return f"{foreseen / found - 1:+.1%}" if found else ""


def title(row: Record) -> str:
    """The work of a row in words."""
    words = [f"{row['shape'].upper()} {TITLES[row['adapter']]}", f"{row['rows']}×{row['length']:,} tokens"]
    words += [str(row["optimizer"])] if row["optimizer"] != OPTIMIZERS[row["adapter"]][0] else []
    words += [f"documents of mean length {row['mean']}"] if row["mean"] else []
    words += [f"{row['supervised']:.0%} supervised"] if row["supervised"] < 1 else []
    return ", ".join(words)


def groups(records: Iterable[Record]) -> list[list[Record]]:
    """Rows of the same work on the same kind of card."""
    found: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for row in records:
        found[tuple(row[name] for name in SAME)].append(row)
    return list(found.values())


def table(records: Sequence[Record]) -> Iterator[str]:
    """A table for each piece of work, as Markdown."""
    for rows in groups(records):
        yield f"\n{title(rows[0])}, {rows[0]['card']}, {rows[-1]['date']}\n"
        yield (
            "| layers | asked for | layout | tokens/s | seconds, foreseen | peak GiB, foreseen | reserved | host |"
        )
        yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
        for row in rows:
            moved = ", embedding in host memory" if row["embedding"] == "host" else ""
            start = f"| {row['layers']} | {row['asked']} | {row['plan']}{moved} "
            if row["status"] != "ok":
                yield start + f"| {row['status']} | | {row['foreseen_peak_gib']:.2f} | | |"
                continue
            yield start + (
                f"| {row['tokens_per_second']:,} "
                f"| {row['step_seconds']:.3f}, {off(row['step_seconds'], row['foreseen_seconds'])} "
                f"| {row['peak_gib']:.2f}, {off(row['peak_gib'], row['foreseen_peak_gib'])} "
                f"| {row['reserved_gib']:.2f} | {row['host_gib']:.2f} |"
            )


# ---------------------------------------------------------------- more layers than a measurement had


def account(records: Sequence[Record], layers: int) -> Iterator[str]:
    """Peaks worked out for `layers` layers, from two depths of one policy: so much a layer, and the rest.

    A policy for all layers makes peaks that are straight lines over the number of layers, or nearly: which moment is
    the highest may change. So what the planner says of that depth stands beside it.
    """
    for rows in groups(records):
        depths: dict[tuple[str, str], dict[int, Record]] = defaultdict(dict)
        for row in rows:
            if row["status"] == "ok" and not row["asked"].startswith("within"):
                depths[row["asked"], row["embedding"]][row["layers"]] = row
        for (policy, embedding), found in depths.items():
            if len(found) < 2:
                continue
            few, many = min(found), max(found)
            each = (found[many]["peak_gib"] - found[few]["peak_gib"]) / (many - few)
            host = (found[many]["host_gib"] - found[few]["host_gib"]) / (many - few)
            where = ", embedding in host memory" if embedding == "host" else ""
            rest = found[few]["peak_gib"] - few * each
            yield (
                f"{title(found[few])}, {policy}{where}: {each:.3f} GiB a layer (measured with {few} and {many}) and "
                f"{rest:.2f} GiB besides: {rest + layers * each:.2f} GiB with {layers} layers "
                f"({_foreseen_peak(found[few], policy, layers):.2f} foreseen); {layers * host:.1f} GiB of the host"
            )


def _foreseen_peak(row: Record, policy: str, layers: int) -> float:
    from benchmarks.batches import documents
    from benchmarks.shapes import SHAPES

    lengths = documents(row["rows"], row["length"], row["mean"])
    supervised = round(row["supervised"] * sum(lengths))
    work = work_of(row["adapter"], lengths, supervised, optimizer=row["optimizer"])
    facts = facts_of(SHAPES[row["shape"]] | {"num_hidden_layers": layers})
    plan = plan_step(
        facts, work, card=card_name(row["card"]), budget=1.0, policy=policy, embedding=row["embedding"],
        host_bytes=None,
    )  # fmt: skip
    return plan.peak_bytes / GIB


# ---------------------------------------------------------------- a picture

_OURS, _PICKED, _PEER = "#0072B2", "#009E73", "#D55E00"  # Okabe and Ito's colours: told apart by everyone


def peers(path: Path, row: Record) -> list[tuple[str, float, float]]:
    """(name, peak GiB, tokens/s) of the peers that `compare.py` measured on the same card at the same work."""
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    case = f"{row['shape']}-{row['adapter']}"
    return [
        (peer["system"], peer["peak_gib"], peer["tokens_per_second"])
        for peer in rows
        if (peer["case"], peer["card"], peer["status"]) == (case, row["card"], "ok")
        and peer["tokens"] == row["rows"] * row["length"]
        and not peer["system"].startswith("tunesmith")
    ]


def draw(rows: Sequence[Record], beside: Sequence[tuple[str, float, float]], path: Path) -> None:
    """Tokens per second over the peak of memory: within budgets as a line, picked by hand and peers as points."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ok = [row for row in rows if row["status"] == "ok"]
    within = sorted((r for r in ok if r["asked"].startswith("within")), key=lambda r: r["peak_gib"])
    picked = [row for row in ok if not row["asked"].startswith("within")]
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for points, colour, look, label in (
        (within, _OURS, "o-", "Tunesmith, planned within a budget"),
        (picked, _PICKED, "D", "Tunesmith, one policy for all layers"),
    ):
        if points:
            places = [[r["peak_gib"] for r in points], [r["tokens_per_second"] / 1000 for r in points]]
            axes.plot(*places, look, color=colour, label=label)
    for row in picked:
        at = (row["peak_gib"], row["tokens_per_second"] / 1000)
        axes.annotate(row["asked"], at, xytext=(6, -11), textcoords="offset points", fontsize=8)
    if beside:
        axes.plot([p[1] for p in beside], [p[2] / 1000 for p in beside], "s", color=_PEER, label="peers")
    for name, peak, speed in beside:
        axes.annotate(name, (peak, speed / 1000), xytext=(6, -11), textcoords="offset points", fontsize=8)
    axes.margins(x=0.12)  # for the names beside the last points
    axes.set_xlabel("peak of GPU memory, GiB")
    axes.set_ylabel("thousand tokens per second")
    axes.set_title(f"{title(rows[0])}, {rows[0]['card']}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def show(arguments: argparse.Namespace) -> None:
    """Print and draw what was asked for."""
    records = read(arguments.out)
    if arguments.table:
        print("\n".join(table(records)))
    if arguments.account:
        print("\n".join(account(records, arguments.account)))
    if arguments.picture:
        rows = [row for row in records if row["shape"] == arguments.shape]
        if not rows:
            raise SystemExit(f"{arguments.out} has no row of the shape {arguments.shape}.")
        largest = max(groups(rows), key=len)
        draw(largest, peers(arguments.peers, largest[0]), arguments.picture)
        print(arguments.picture)
