"""What stands in the results: a table for each case, and the bars, the claims that the project holds itself to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.peers.tables import FAMILIES

Record = dict[str, Any]

OURS = "tunesmith-"
KEEP = ("tunesmith-keep",)
UNSLOTH = ("unsloth", "unsloth-none")
STOCK = ("stock", "stock-checkpointing")


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure that has to be reached.

    Attributes:
        text: the claim.
        case: a row of `CASES`.
        systems: names, or a prefix that ends in `-`; the fastest of them counts.
        within_gib: only those whose peak is not above it.
        no_more_memory: only where the peak is not above that of the unit either.
        measure: a field of the results.
        over: (case, systems) whose fastest is the unit of the bound; None for absolute figures.
        at_least, at_most: the bound.
    """

    text: str
    case: str
    systems: tuple[str, ...]
    at_least: float | None = None
    at_most: float | None = None
    measure: str = "tokens_per_second"
    over: tuple[str, tuple[str, ...]] | None = None
    within_gib: float | None = None
    no_more_memory: bool = False


def _lean(case: str, at_least: float) -> Bar:
    text, over = f"{case} within its memory over Unsloth with its checkpointing", (case, ("unsloth",))
    return Bar(text, case, ("tunesmith-plan_lean",), at_least=at_least, over=over, no_more_memory=True)


BARS = (
    Bar("8B QLoRA kept, tokens/s", "8b-qlora", KEEP, at_least=15_800),
    Bar("8B QLoRA kept, peak GiB", "8b-qlora", KEEP, at_most=32.0, measure="peak_gib"),
    Bar("8B QLoRA kept over Unsloth without checkpointing", "8b-qlora", KEEP, at_least=1.1,
        over=("8b-qlora", ("unsloth-none",))),
    Bar("8B QLoRA within 8.06 GiB over Unsloth with its checkpointing", "8b-qlora", (OURS,), at_least=1.25,
        over=("8b-qlora", ("unsloth",)), within_gib=8.06),
    Bar("8B LoRA kept, tokens/s", "8b-lora", ("tunesmith-keep_all", *KEEP), at_least=16_200),
    Bar("8B QLoRA packed documents over the better of Unsloth", "8b-qlora-packed", (OURS,), at_least=2.0,
        over=("8b-qlora-packed", UNSLOTH)),
    Bar("135M LoRA over the better of Unsloth", "135m-lora", (OURS,), at_least=2.0,
        over=("135m-lora", UNSLOTH)),
    Bar("135M LoRA over the better of transformers", "135m-lora", (OURS,), at_least=3.0,
        over=("135m-lora", STOCK)),
    Bar("8B QLoRA with 10% supervised over all supervised", "8b-qlora-masked", KEEP, at_least=1.05,
        over=("8b-qlora", KEEP)),
    Bar("135M LoRA with 10% supervised over all supervised", "135m-lora-masked", KEEP, at_least=1.2,
        over=("135m-lora", KEEP)),
    Bar("8B full fine-tuning with 8-bit Adam over the better of transformers", "8b-full", (OURS,), at_least=1.3,
        over=("8b-full", STOCK)),
    *(Bar(f"{shape} QLoRA kept, within its memory, over Unsloth without checkpointing", f"{shape}-qlora",
          ("tunesmith-plan_kept",), at_least=1.1, over=(f"{shape}-qlora", ("unsloth-none",)), no_more_memory=True)
      for shape in FAMILIES),
    *(_lean(f"{shape}-qlora", 1.25) for shape in FAMILIES),
    *(_lean(case, 1.3) for case in ("70b-qlora", "70b-qlora-long")),
)  # fmt: skip


def latest(records: Iterable[Record]) -> list[Record]:
    """The last row of each card, case, system and layout, in the order in which they were first measured."""
    found: dict[tuple[str, ...], Record] = {}
    for record in records:
        found[tuple(record[name] for name in ("card", "case", "system", "layout"))] = record
    return list(found.values())


def _fastest(
    records: Sequence[Record], case: str, systems: Sequence[str], within_gib: float | None = None
) -> Record | None:
    """The measured row with the most tokens a second."""
    fitting = [
        record
        for record in records
        if record["case"] == case
        and record["status"] == "ok"
        and any(
            record["system"] == s or (s.endswith("-") and record["system"].startswith(s)) for s in systems
        )
        and (within_gib is None or record["peak_gib"] <= within_gib)
    ]
    return max(fitting, key=lambda record: record["tokens_per_second"], default=None)


def _name(record: Record) -> str:
    """A system with its layout, where that was a choice."""
    chosen = record["layout"] != "rows" and not record["system"].startswith(OURS)
    return f"{record['system']} ({record['layout']})" if chosen else str(record["system"])


# ---------------------------------------------------------------- bars


def judge(bar: Bar, records: Sequence[Record]) -> tuple[str, str]:
    """Whether a bar holds by the rows of one card (`holds`, `fails`, `not measured`), and by which figures."""
    ours = _fastest(records, bar.case, bar.systems, bar.within_gib)
    if ours is None:
        return "not measured", "none of ours" + (f" within {bar.within_gib} GiB" if bar.within_gib else "")
    value, how, lean = float(ours[bar.measure]), f"{_name(ours)} {ours[bar.measure]:,}", True
    if bar.over is not None:
        unit = _fastest(records, *bar.over)
        if unit is None:
            return "not measured", f"{how}; nothing of {', '.join(bar.over[1])} at {bar.over[0]}"
        value /= unit[bar.measure]
        how += f" / {_name(unit)} {unit[bar.measure]:,} = {value:.3f}"
        if bar.no_more_memory:
            lean = ours["peak_gib"] <= unit["peak_gib"]
            how += f", in {ours['peak_gib']} and {unit['peak_gib']} GiB"
    holds = (bar.at_least is None or value >= bar.at_least) and (bar.at_most is None or value <= bar.at_most)
    holds = holds and lean
    return "holds" if holds else "fails", how


def bars(records: Iterable[Record]) -> str:
    """For each card a Markdown table of `BARS`."""
    rows = latest(records)
    parts = []
    for card in dict.fromkeys(record["card"] for record in rows):
        here = [record for record in rows if record["card"] == card]
        lines = [f"## {card}", "", "| bar | bound | outcome | figures |", "| --- | --- | --- | --- |"]
        for bar in BARS:
            bound = f"≥ {bar.at_least:,}" if bar.at_least is not None else f"≤ {bar.at_most:,}"
            outcome, how = judge(bar, here)
            lines.append(f"| {bar.text} | {bound} | {outcome} | {how} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) if parts else "No results."


# ---------------------------------------------------------------- table

_HEAD = "| system | kind | tokens/s | to the best peer of its kind | peak GiB | reserved GiB | roofline | losses |"


def _best_peers(records: Sequence[Record]) -> dict[str, Record]:
    """The fastest peer of each kind at one case."""
    best = {}
    for kind in dict.fromkeys(record["kind"] for record in records):
        peers = [r for r in records if r["kind"] == kind and not r["system"].startswith(OURS)]
        fastest = max(
            (r for r in peers if r["status"] == "ok"), key=lambda r: r["tokens_per_second"], default=None
        )
        if fastest is not None:
            best[kind] = fastest
    return best


def _line(record: Record, best: dict[str, Record], tflops: float) -> str:
    if record["status"] != "ok":
        reason = record["reason"].replace("|", "\\|")
        return f"| {_name(record)} | {record['kind']} | {record['status']} | – | – | – | – | {reason} |"
    peer = best.get(record["kind"])
    ratio = f"{record['tokens_per_second'] / peer['tokens_per_second']:.2f} × {_name(peer)}" if peer else "–"
    share = record["flops"] / record["step_seconds"] / (tflops * 1e12)
    first, last = record["losses"][:3], record["losses"][-1]
    losses = f"{', '.join(f'{loss:.4f}' for loss in first)} … {last:.4f}"
    return (
        f"| {_name(record)} | {record['kind']} | {record['tokens_per_second']:,} | {ratio} "
        f"| {record['peak_gib']:.2f} | {record['reserved_gib']:.2f} | {share:.0%} | {losses} |"
    )


def _notes(records: Sequence[Record]) -> Iterator[str]:
    """What a reader of a case's table has to know."""
    measured = [record for record in records if record["status"] == "ok"]
    if not measured:
        return
    first = measured[0]
    per_token = first["flops"] / first["tokens"] / 1e9
    yield f"{first['tokens']:,} tokens a step, {first['supervised']:,} supervised, {per_token:.1f} GFLOP a token."
    if len({record["batch"] for record in measured}) > 1:
        yield "**The systems did not get the same batches.**"
    if len({record["sitting"] for record in records}) > 1:
        yield "Rows come from several sittings: " + ", ".join(sorted({r["sitting"] for r in records})) + "."
    for record in measured:
        for reason, count in record.get("fallbacks", {}).items():
            yield f"{record['system']}: {count} layer calls were not fused ({reason})."


def _versions(records: Sequence[Record]) -> str:
    """All versions that were seen, and the driver."""
    seen: dict[str, set[str]] = {}
    for record in records:
        for name, version in (record.get("versions", {}) | {"driver": record["driver"]}).items():
            if version:
                seen.setdefault(name, set()).add(version)
    dates = sorted({record["date"] for record in records})
    return ", ".join([*(f"{name} {'/'.join(sorted(v))}" for name, v in seen.items()), *dates])


def table(records: Iterable[Record], tflops: float) -> str:
    """For each card and case a Markdown table, fastest first.

    Args:
        tflops: bfloat16 GEMM rate of the card, which the column `roofline` is a share of.
    """
    rows = latest(records)
    parts = []
    for card in dict.fromkeys(record["card"] for record in rows):
        here = [record for record in rows if record["card"] == card]
        parts.append(f"## {card}\n\n{_versions(here)}. Roofline: {tflops:g} TFLOP/s.")
        for case in dict.fromkeys(record["case"] for record in here):
            of_case = [record for record in here if record["case"] == case]
            of_case.sort(key=lambda record: -record.get("tokens_per_second", 0))
            best = _best_peers(of_case)
            lines = [f"### {case}: {of_case[0]['title']}", "", _HEAD, "| --- " * 8 + "|"]
            lines += [_line(record, best, tflops) for record in of_case]
            notes = list(_notes(of_case))
            parts.append("\n".join([*lines, "", *notes] if notes else lines))
    return "\n\n".join(parts) if parts else "No results."
