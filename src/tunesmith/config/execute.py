"""A run from start to end: claim the directory, assemble, say what will happen, train, save the result.

The CLI and the Python interface both call `execute`; there is one way to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from tunesmith.config.result import RunResult, losses_by_source
from tunesmith.config.run_dir import (
    claimed_run_dir,
    refuse_several_processes,
    resolved_yaml,
    versions,
    write_run_files,
)
from tunesmith.contracts.errors import UserError
from tunesmith.settings.run import RunSettings

if TYPE_CHECKING:
    from tunesmith.config.assemble import Run
    from tunesmith.training.trainer import Outcome


def execute(
    settings: RunSettings, console: Console, *, questions: Sequence[str] = (), answer_tokens: int = 96
) -> RunResult:
    """Train as the settings say, from the newest intact checkpoint where there is one.

    Args:
        questions: user messages whose answers are shown before and after training.
        answer_tokens: upper bound of the length of those answers.

    Raises:
        UserError: anything that the user can mend; what was written before stays.
    """
    refuse_several_processes()
    with claimed_run_dir(Path(settings.output.dir).expanduser()) as folder:
        if settings.output.resume == "never" and any((folder / "checkpoints").glob("step-*")):
            raise UserError(
                f"output.dir: {folder} holds checkpoints, and output.resume is never.",
                hint="Choose another output.dir, or set output.resume: auto to go on from them.",
            )
        return _execute(settings, folder, console, questions, answer_tokens)


def _execute(
    settings: RunSettings, folder: Path, console: Console, questions: Sequence[str], answer_tokens: int
) -> RunResult:
    from tunesmith.config.assemble import assemble
    from tunesmith.config.summary import data_lines, print_answers, print_plan, print_result
    from tunesmith.training.console import ConsoleView
    from tunesmith.training.metrics import EventLog, draw_loss_curve, read_events
    from tunesmith.training.quiet import quiet_libraries

    quiet_libraries()
    with console.status("preparing data and model"):
        run = assemble(settings, folder)
    resumed = _resume(run, console)
    print_plan(console, run)
    for warning in run.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    write_run_files(folder, settings)  # not before: refused settings must not replace those of the checkpoint
    before = _answers(run, questions, answer_tokens)
    log = EventLog(folder / "events.jsonl", keep_until=run.trainer.step if resumed else None)
    with closing(log), ConsoleView(console) as view:
        run.trainer.observers += [log, view]
        with run.packed():
            outcome = run.trainer.train()
    for reason, count in (run.installed.fallbacks if run.installed is not None else {}).items():
        console.print(
            f"note: fused layers ran in stock form {count:,} times: {reason}", style="dim", markup=False
        )
    if settings.data.streaming:
        lines = ["rows of the streams, counted again in each pass:", *data_lines(run, training_only=True)]
        console.print("\n".join(lines), style="dim", markup=False, highlight=False, soft_wrap=True)
    result = _save(run, folder, outcome) if outcome.reason != "interrupted" else None
    curve = folder / "loss.png"
    events = read_events(folder / "events.jsonl")
    drawn = draw_loss_curve(events, curve)
    if result is not None:
        print_answers(console, questions, before, _answers(run, questions, answer_tokens))
    finished = RunResult(
        dir=folder,
        result=result,
        loss_curve=curve if drawn else None,
        reason=outcome.reason,
        steps=outcome.step,
        first_eval=outcome.first_eval,
        last_eval=outcome.last_eval,
        tokens=outcome.tokens,
        seconds=outcome.seconds,
        by_source=losses_by_source(events),
    )
    print_result(console, finished)
    return finished


def _resume(run: Run, console: Console) -> bool:
    """Load the newest intact checkpoint, if there is one; say which damaged ones are passed over."""

    def on_damaged(path: Path, reason: str) -> None:
        console.print(
            f"warning: passing over the damaged checkpoint {path}: {reason}",
            style="yellow",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )

    run.store.clean_temporary()
    checkpoint = run.store.newest_intact(on_damaged)
    if checkpoint is None:
        return False
    run.trainer.resume(checkpoint)
    return True


def _answers(run: Run, questions: Sequence[str], answer_tokens: int) -> list[str]:
    from tunesmith.training.sample import sample_answers

    if not questions:
        return []
    prompts = [run.data.renderer.prompt([{"role": "user", "content": question}]) for question in questions]
    return sample_answers(
        run.causal.model,
        run.tokenizer,
        prompts,
        max_new_tokens=answer_tokens,
        autocast=run.backend.autocast(),
    )


def _save(run: Run, folder: Path, outcome: Outcome) -> Path:
    from tunesmith.export.card import Facts
    from tunesmith.export.result import save_result

    settings = run.settings
    adapter = settings.adapter.kind != "none"
    train = settings.train
    sources = [
        f"`{name}`: {report.rows_kept:,} of {report.rows_in:,} rows"
        for name, report in run.data.reports[: len(settings.data.train)]
    ]
    shown = (
        "learning_rate",
        "scheduler",
        "warmup",
        "optimizer",
        "global_batch",
        "sequence_length",
        "packing",
        "seed",
    )
    facts = Facts(
        base_model=settings.model.name,
        base_revision=settings.model.revision,
        adapter=adapter,
        quantize=settings.model.quantize,
        sources=sources,
        rows=sum(report.rows_kept for _, report in run.data.reports[: len(settings.data.train)])
        if settings.data.streaming
        else len(run.data.train_N),
        steps=outcome.step,
        tokens=outcome.all_tokens,
        first_eval=outcome.first_eval,
        last_eval=outcome.last_eval,
        hyperparameters={name: getattr(train, name) for name in shown},
        versions=versions(),
    )
    return save_result(
        folder / ("adapter" if adapter else "model"),
        model=run.causal.model,
        tokenizer=run.tokenizer,
        chat_template=run.data.renderer.template_source,
        dtype=run.causal.compute_dtype,
        facts=facts,
        files={"run.yaml": resolved_yaml(settings)},
    )
