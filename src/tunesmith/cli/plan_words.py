"""The figures of a plan in words, for a terminal and for a page. They are said here, and decided by the planner."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tunesmith.config.plan_run import PlannedRun
from tunesmith.contracts.plural import counted
from tunesmith.contracts.visible import visible
from tunesmith.planning.facts import trained_parameters
from tunesmith.planning.fit import USABLE_HOST
from tunesmith.planning.plan import PARTS, Alternative, Plan, Summary

_GIB = 2**30


def gib(count: float) -> str:
    """Bytes as GiB: `12.3`, and `0.04` where there are few."""
    size = count / _GIB
    return f"{size:,.1f}" if size >= 1 or size == 0 else f"{size:.2f}"


def span(seconds: float) -> str:
    """A time that is an estimate: `0.42 s`, `35 minutes`, `3.2 hours`, `2.1 days`."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    for unit, size, most in (("minutes", 60, 120), ("hours", 3600, 48)):
        if seconds / size < most:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86400:.3g} days"


def _parameters(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"


def model_lines(run: PlannedRun, why_card: str) -> dict[str, str]:
    """What is planned, by name: model, what trains, card, rows."""
    facts, request, work = run.facts, run.request, run.request.work
    held = {"none": "", "nf4": ", the base in 4 bits (NF4)", "int8": ", the base in 8 bits"}[work.quantize]
    trained = _parameters(trained_parameters(facts, work))
    if work.full:
        what = (
            f"all weights: {trained} parameters in {'float32' if work.trained_itemsize == 4 else 'bfloat16'}"
        )
    else:
        what = f"LoRA of rank {work.rank}: {trained} parameters{held}"
    card = run.card
    reached = f"speeds {'estimated from its data sheet' if card.estimated else 'measured on such a card'}"
    rows = f"{counted(request.rows, 'row')} of {sum(work.documents):,} tokens a step"
    return {
        "model": f"{visible(facts.name)}: {_parameters(facts.parameters)} parameters in "
        f"{counted(len(facts.layers), 'layer')} ({facts.model_type}, from {run.config_from})",
        "trains": f"{what}, computed in {run.computes}, with {work.optimizer}",
        "card": f"{card.name}, {card.gib:.1f} GiB, {reached}" + (f" ({why_card})" if why_card else ""),
        "batch": rows,
    }


def plan_lines(run: PlannedRun) -> dict[str, str]:
    """What was planned, by name: micro-batch, layers, sizes of chunks, step, run."""
    plan, request = run.plan, run.request
    passes = -(-request.rows // plan.micro_batch_rows)
    chunks = ", ".join(f"{name} {size:,} tokens at once" for name, size in plan.chunks.items())
    lines = {
        "micro-batch": f"{counted(plan.micro_batch_rows, 'row')}, {plan.tokens:,} tokens; "
        f"{counted(passes, 'micro-batch', 'micro-batches')} a step",
        "layers": plan.layout,
        "embedding": "in host memory" if plan.embedding == "host" else "",
        "chunks": chunks,
        "host memory": _pinned(plan, run.host_known),
        "step": f"{span(plan.step_seconds)}, {plan.tokens_per_second:,.0f} tokens/s",
        "run": _length(plan, request.steps),
    }
    return {name: text for name, text in lines.items() if text}


def _pinned(plan: Plan, host_known: bool) -> str:
    """Pinned memory of the host, and what it asks of a machine that is not known; empty where there is none."""
    if not plan.host_bytes:
        return ""
    needs = f", of a machine with at least {gib(plan.host_bytes / USABLE_HOST)} GiB free"
    return f"{gib(plan.host_bytes)} GiB pinned{'' if host_known else needs}"


def _length(plan: Plan, steps: int | None) -> str:
    """How long the run takes, or 1,000 steps of it."""
    if plan.total_seconds is not None and steps is not None:
        return f"{span(plan.total_seconds)} for {counted(steps, 'step')}"
    return f"{span(1000 * plan.step_seconds)} for each 1,000 steps; train.steps says how many there are"


def verdict(run: PlannedRun) -> str:
    """Whether it fits, in a sentence."""
    plan, host = run.plan, run.request.host_bytes
    if plan.fits:
        return f"It fits: at most {gib(plan.peak_bytes)} of {gib(plan.budget_bytes)} GiB."
    if not plan.missing_bytes and host is not None:
        free = (
            "is free" if run.host_known else "such a card's machine is taken to have free; see --host-memory"
        )
        return (
            f"It does not fit: {gib(plan.host_bytes)} GiB of host memory would be pinned, and {gib(host)} may be, "
            f"half of what {free}."
        )
    return (
        f"It does not fit: {gib(plan.peak_bytes)} GiB are needed and {gib(plan.budget_bytes)} may be used; "
        f"{gib(plan.missing_bytes)} GiB are missing."
    )


def parts_of(plan: Plan) -> Iterator[tuple[str, int]]:
    """(name, bytes) of the parts that are there."""
    for name in PARTS:
        if plan.parts.get(name):
            yield name, plan.parts[name]


NOTHING_NEAR = (
    "Nothing near fits: no two settings changed at once, and no other card alone. A smaller model may, or more "
    "changes together, such as QLoRA on a larger card."
)
"""In place of settings that fit, where there are none."""

ALTERNATIVE_HEADS = ("", "fits", "micro-batch", "peak GiB", "tokens/s", "step")


def alternative_rows(
    run: PlannedRun, alternatives: Sequence[Alternative]
) -> Iterator[tuple[tuple[str, ...], str]]:
    """(cells below `ALTERNATIVE_HEADS`, the settings to write): this plan first, then what other choices give."""
    yield ("as it is", *_cells(run.plan.summary)), ""
    for alternative in alternatives:
        yield (alternative.what, *_cells(alternative.summary)), " ".join(alternative.settings)


def _cells(summary: Summary) -> tuple[str, ...]:
    missing = f"{gib(summary.missing_bytes)} GiB missing" if summary.missing_bytes else "lacks host memory"
    fits = "yes" if summary.fits else missing
    return (
        fits,
        counted(summary.micro_batch_rows, "row"),
        gib(summary.peak_bytes),
        f"{summary.tokens_per_second:,.0f}",
        span(summary.step_seconds),
    )
