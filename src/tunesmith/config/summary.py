"""What a run says before it starts and after it ends."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tunesmith.config.run_report import REPORT_COLUMN
from tunesmith.contracts.plural import counted
from tunesmith.data.feed import TableFeed
from tunesmith.data.proof import REASON as PREFIX

if TYPE_CHECKING:
    from tunesmith.config.assemble import Run
    from tunesmith.config.result import RunResult
    from tunesmith.planning.plan import Plan
    from tunesmith.settings.model import AdapterSettings


def _show(
    console: Console, rows: Sequence[tuple[str, str | Text]], *, whole_lines: bool = False, width: int = 0
) -> None:
    """Names and values in two columns, the first at least `width` wide where lines are whole.

    A terminal gets the values wrapped inside their column; a log, and with `whole_lines` the terminal too,
    gets every line whole, so that a path can be copied or searched for.
    """
    texts = [(name, Text(value) if isinstance(value, str) else value) for name, value in rows]
    if console.is_terminal and not whole_lines:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in texts:
            grid.add_row(name, value)
        console.print(grid, highlight=False)
        return
    width = max(width, *(len(name) for name, _ in texts), 0)
    for name, value in texts:
        label = name
        for line in value.split("\n", allow_blank=True):
            console.print(Text.assemble((f"{label:<{width}}", "bold"), "  ", line), soft_wrap=True)
            label = ""


def _parameters(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)


def _adapter(adapter: AdapterSettings) -> str:
    """What is trained on a frozen model, with what was asked for beyond the usual."""
    if adapter.path:
        return f"the adapter {adapter.path}"
    start = adapter.init_lora_weights
    extras = [
        *(["DoRA"] if adapter.use_dora else []),
        *(["rsLoRA"] if adapter.use_rslora else []),
        *([f"start {start}"] if isinstance(start, str) else []),
        *(["biases"] if adapter.bias != "none" else []),
        *adapter.modules_to_save,
        *([counted(len(adapter.new_tokens), "new token")] if adapter.new_tokens else []),
    ]
    return f"LoRA rank {adapter.rank}" + (f" with {', '.join(extras)}" if extras else "")


def _model_line(run: Run) -> str:
    settings = run.settings
    parameters = list(run.causal.model.named_parameters())
    trained = sum(p.numel() for _, p in parameters if p.requires_grad)
    added = trained if settings.adapter.kind == "lora" else 0
    # an embedding on the host is no parameter
    moved = run.installed.embedding if run.installed is not None else None
    everything = run.causal.base.num_parameters() - added + (moved.elements if moved is not None else 0)
    plain = str(run.causal.compute_dtype).removeprefix("torch.")
    held = {"nf4": "4-bit NF4", "int8": "8-bit integers"}.get(settings.model.quantize, plain)
    what = _adapter(settings.adapter) if settings.adapter.kind == "lora" else "all parameters"
    how = ""
    if settings.adapter.kind == "none":
        held = next(str(p.dtype).removeprefix("torch.") for _, p in parameters if p.requires_grad)
        how = f", computed in {plain}" + (" and rounded stochastically" if held == "bfloat16" else "")
    return (
        f"{settings.model.name}: {_parameters(everything)} parameters in {held} on {run.backend.device}; "
        f"{what}, {_parameters(trained)} trained ({trained / everything:.1%}){how}"
    )


def data_lines(run: Run, *, training_only: bool = False) -> list[str]:
    """One line per source with its rows, those that were dropped counted by reason, and some of them named."""
    lines = []
    training = len(run.settings.data.train)
    for number, (name, report) in enumerate(run.data.reports[: training if training_only else None]):
        if number < training and run.settings.data.streaming and not report.rows_in:
            lines.append(f"{name}: read while it trains")
            continue
        kind = "" if number < training else " (held out)"
        dropped = "".join(f", {count:,} dropped: {reason}" for reason, count in report.dropped.items())
        cut = (
            f", {report.truncated:,} cut at {run.settings.train.sequence_length}" if report.truncated else ""
        )
        kept = counted(report.rows_kept, "row")
        lines.append(f"{name}{kind}: {kept} as {report.format}{cut}{dropped}")
        lines += [f"  {example}" for example in report.examples[:3]]
        if PREFIX in report.dropped:
            lines.append(
                "  data.prefix_mismatch: split makes a document of each turn, as a server would show it"
            )
    return lines


_KEPT = {
    "keep_all_unpacked": "all activations kept, and weights unpacked",
    "keep_unpacked": "activations kept, and weights unpacked",
    "keep_all": "all activations kept",
    "keep": "activations kept",
    "keep_offload_attention": "gate and up kept, other activations in host memory",
    "recompute_gate_up": "gate and up recomputed in backward",
    "offload_attention": "activations in host memory, gate and up recomputed in backward",
    "recompute_projections": "q, k, v, gate and up recomputed in backward",
    "recompute": "layers recomputed in backward",
    "offload": "layer inputs in host memory, layers recomputed in backward",
    "keep_offload_all": "activations in host memory",
}


def _rows_line(run: Run) -> str:
    """What an epoch becomes; of a stream only what is known before it is read."""
    settings, data = run.settings, run.data
    if not isinstance(data.feed, TableFeed):
        return f"streamed through a buffer of {settings.data.buffer_tokens:,} tokens"
    rows, _ = data.feed.epoch(0)
    lengths_E = data.corpus.lengths[[document for row in rows for document in row]]
    documents = "row" if data.documents_are_rows else "document"
    tokens = counted(int(data.corpus.lengths[data.train_N].sum()), "token")
    line = f"{counted(len(data.train_N), documents)}, {tokens} → "
    if not settings.train.packing:
        return line + counted(len(rows), "row")
    full = lengths_E.sum() / (len(rows) * settings.train.sequence_length)
    packs = counted(len(rows), "pack")
    return f"{line}{packs} of up to {settings.train.sequence_length:,} tokens ({full:.1%} full)"


def _plan_lines(run: Run) -> list[str]:
    settings = run.settings
    batch = settings.train.global_batch
    grouping = run.trainer.grouping
    micro = (
        counted(grouping.rows_per_batch, "row")
        if grouping.rows_per_batch
        else f"up to {grouping.max_tokens:,} tokens"
    )
    held = counted(len(run.data.held_out_N), "row" if run.data.documents_are_rows else "document")
    steps = counted(run.trainer.cadence.total_steps, "step")
    planned = run.planned.plan if run.planned is not None else None
    kept = _KEPT[run.fit.policy] if planned is None else _strip(planned)
    return [
        f"{_rows_line(run)}; {held} held out",
        f"{steps} of {counted(batch, 'row') if isinstance(batch, int) else batch}; "
        f"micro-batches of {micro}, {kept}; {run.attention} attention",
        *([_foreseen(planned)] if planned is not None else []),
    ]


def _strip(plan: Plan) -> str:
    """What layers keep, from the first to the last."""
    if len(plan.strip) == 1:
        return _KEPT[plan.policies[0]]
    return f"layers {plan.layout}"


def _foreseen(plan: Plan) -> str:
    """Memory and time by the plan."""
    with_embedding = " with the input embedding" if plan.embedding == "host" else ""
    host = f", {plan.host_bytes / 2**30:.1f} GiB of the host{with_embedding}" if plan.host_bytes else ""
    return (
        f"foreseen: at most {plan.peak_bytes / 2**30:.1f} of {plan.budget_bytes / 2**30:.1f} GiB{host}; "
        f"{plan.step_seconds:.3g} s a step of full rows, {plan.tokens_per_second:,.0f} tokens/s"
    )


def _graphs(run: Run) -> str:
    if run.no_graphs is None:
        return "forward and backward are recorded and replayed"
    return f"none: {run.no_graphs}"


def _group_lines(run: Run) -> list[str]:
    """What each pattern of `train.groups` found, with its peak learning rate and its decay."""
    peak = run.settings.train.learning_rate
    return [
        f"{group['match']}: {counted(len(group['params']), 'tensor')}, "
        f"{_parameters(sum(p.numel() for p in group['params']))} parameters; "
        f"learning rate {peak * group.get('lr_ratio', 1.0):.2e}, weight decay {group['weight_decay']:g}"
        for group in run.backend.optimizer.param_groups
        if "match" in group
    ]


def _left_out(run: Run) -> list[tuple[str, str, str]]:
    """What the targets of a fresh adapter name and it is not on, with the reasons."""
    from tunesmith.models.adapter_targets import left_out_rows

    adapter = run.settings.adapter
    if adapter.kind == "none" or adapter.path is not None:
        return []
    return left_out_rows(run.causal.base, adapter.targets)


def print_plan(console: Console, run: Run) -> None:
    """Say what will be trained, on what, and how."""
    notes = sorted({note for _, report in run.data.reports for note in report.notes})
    layers = [*_left_out(run), *(run.installed.table() if run.installed is not None else [])]
    _show(
        console,
        [
            ("model", _model_line(run)),
            *(("layers", f"{what}: {how}, {why}") for what, how, why in layers),
            *([("graphs", _graphs(run))] if run.installed is not None and run.installed.fused else []),
            ("data", "\n".join([*data_lines(run), *notes])),
            ("plan", "\n".join(_plan_lines(run))),
            *([("groups", "\n".join(lines))] if (lines := _group_lines(run)) else []),
            ("output", run.settings.output.dir),
        ],
    )


def print_answers(
    console: Console, questions: Sequence[str], before: Sequence[str], after: Sequence[str]
) -> None:
    """Show sample answers before and after training."""
    for question, old, new in zip(questions, before, after, strict=True):
        console.print()
        _show(
            console,
            [("question", question), ("before", Text(old, style="dim")), ("after", Text(new, style="green"))],
        )


def _best_line(result: RunResult) -> str:
    """The lowest held-out loss, and where the weights that had it are."""
    assert result.best_eval is not None, "a best step has a loss"
    loss = f"{result.best_eval:.4f}"
    if not result.best_step:
        return f"{loss} before training: the held-out loss never fell below that"
    where = result.best_checkpoint or "no checkpoint was written there"
    return f"{loss} at step {result.best_step:,}: {where}"


def print_result(console: Console, result: RunResult) -> None:
    """Say how it went and where everything lies; the row of the report stands below (`run_report.reported`)."""
    console.print()
    rows: list[tuple[str, str | Text]] = []
    if result.first_eval is not None and result.last_eval is not None:
        change = f" ({result.last_eval / result.first_eval - 1:+.1%})" if result.first_eval else ""
        losses = Text.assemble(f"{result.first_eval:.4f} → ", (f"{result.last_eval:.4f}", "bold"), change)
        rows.append(("held-out loss", losses))
        rows += [
            ("", f"{name}: {first:.4f} → {last:.4f}") for name, (first, last) in result.by_source.items()
        ]
    if result.best_step is not None and result.steps:
        rows.append(("best", _best_line(result)))
    if result.tokens:
        speed = result.tokens / result.seconds
        seconds = timedelta(seconds=round(result.seconds))
        before = result.steps - result.new_steps
        steps = counted(result.new_steps, "step") + (f" after step {before:,}" if before else "")
        figures = f"{steps}, {counted(result.tokens, 'token')} in {seconds}"
        rows.append(("training", f"{figures} ({speed:,.0f} tokens/s with evaluation and saving)"))
    if result.result is not None:
        rows.append((result.result.name, str(result.result)))
        if result.result_step != result.steps:
            rows.append(("", f"with the weights of step {result.result_step:,}, the best that was kept"))
    if result.loss_curve is not None:
        rows.append(("loss curve", str(result.loss_curve)))
    _show(console, rows, whole_lines=True, width=REPORT_COLUMN)


def print_ending(console: Console, result: RunResult) -> None:
    """Say why a run ended before its last step and how it goes on, and what is missing."""
    if result.loss_curve is None:
        console.print(
            "For a loss curve install matplotlib: pip install matplotlib", style="dim", markup=False
        )
    if result.reason == "interrupted":
        console.print(
            f"Stopped after step {result.steps} and saved. The same command goes on from there.",
            style="yellow",
        )
    if result.reason == "early stop":
        console.print(
            f"Stopped early after step {result.steps}: the held-out loss no longer fell. "
            "Raise train.early_stopping.patience and run the same command to go on.",
            style="yellow",
            soft_wrap=not console.is_terminal,
        )
    if result.reason == "time":
        console.print("train.max_hours is over. Raise it and run the same command to go on.", style="yellow")
