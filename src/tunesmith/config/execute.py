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
    write_run_files,
)
from tunesmith.config.run_report import record_answers, record_counts, record_data, reported
from tunesmith.config.telling import teller
from tunesmith.config.tracking import refuse_missing_trackers, trackers_of
from tunesmith.contracts.errors import UserError
from tunesmith.settings.run import RunSettings

if TYPE_CHECKING:
    from tunesmith.config.assemble import Run
    from tunesmith.config.leave_result import Left
    from tunesmith.training.cadence import Outcome


def execute(
    settings: RunSettings,
    console: Console,
    *,
    questions: Sequence[str] = (),
    answer_tokens: int = 96,
    quiet: bool = False,
) -> RunResult:
    """Train as the settings say, from the newest intact checkpoint where there is one.

    Args:
        console: where to print; a terminal gets a view that is drawn in place, anything else plain lines.
        questions: user messages whose answers are shown before and after training.
        answer_tokens: upper bound of the length of those answers.
        quiet: print warnings and the final lines only, and ask no questions.

    Raises:
        UserError: anything that the user can mend; what was written before stays.
    """
    refuse_several_processes()
    refuse_missing_trackers(settings)
    with claimed_run_dir(Path(settings.output.dir).expanduser()) as folder, reported(folder, console):
        if settings.output.resume == "never" and any((folder / "checkpoints").glob("step-*")):
            raise UserError(
                f"output.dir: {folder} holds checkpoints, and output.resume is never.",
                hint="Choose another output.dir, or set output.resume: auto to go on from them.",
            )
        result = _execute(settings, folder, console, () if quiet else questions, answer_tokens, quiet=quiet)
    from tunesmith.config.summary import print_ending

    print_ending(console, result)  # behind the row of the report
    return result


def _execute(
    settings: RunSettings,
    folder: Path,
    console: Console,
    questions: Sequence[str],
    answer_tokens: int,
    *,
    quiet: bool,
) -> RunResult:
    from tunesmith.config.assemble import assemble
    from tunesmith.config.leave_result import leave_result
    from tunesmith.config.summary import print_answers, print_plan, print_result
    from tunesmith.training.quiet import quiet_libraries

    quiet_libraries()
    chatter = Console(quiet=True) if quiet else console
    with chatter.status("preparing data and model") as status:
        run = assemble(settings, folder, tell=teller(chatter, status))
    resumed = _resume(run, console)
    print_plan(chatter, run)
    for warning in run.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    write_run_files(folder, settings)  # not before: refused settings must not replace those of the checkpoint
    record_data(folder, run, console)
    before = _answers(run, chatter, questions, answer_tokens)
    outcome = _train(run, folder, console, resumed=resumed, quiet=quiet)
    _print_notes(chatter, run)
    if settings.data.streaming:
        record_counts(folder, run, console)
    left = leave_result(run, folder, outcome, console) if outcome.reason != "interrupted" else None
    if left is not None:
        after = _answers(run, chatter, questions, answer_tokens)
        record_answers(folder, questions, before, after)
        print_answers(chatter, questions, before, after)
    finished = _result(run, folder, outcome, left)
    print_result(console, finished)
    return finished


def _train(run: Run, folder: Path, console: Console, *, resumed: bool, quiet: bool) -> Outcome:
    """The loop, watched by the log, the trackers and whoever looks."""
    from tunesmith.training.console import ConsoleView
    from tunesmith.training.metrics import EventLog

    chatter = Console(quiet=True) if quiet else console
    # before the log drops steps that run again
    trackers = trackers_of(run.settings, folder, run.trainer, chatter)
    log = EventLog(folder / "events.jsonl", keep_until=run.trainer.step if resumed else None)
    with closing(log), ConsoleView(console, quiet=quiet) as view, trackers:
        run.trainer.observers += [log, trackers, view]
        with run.packed():
            return run.trainer.train()


def _result(run: Run, folder: Path, outcome: Outcome, left: Left | None) -> RunResult:
    """Draw the loss curve, and say what there is."""
    from tunesmith.export.plot import draw_loss_curve
    from tunesmith.training.metrics import read_events

    curve, events = folder / "loss.png", read_events(folder / "events.jsonl")
    drawn = draw_loss_curve(events, curve)
    return RunResult(
        dir=folder,
        result=left.path if left is not None else None,
        result_step=left.step if left is not None else None,
        loss_curve=curve if drawn else None,
        reason=outcome.reason,
        steps=outcome.step,
        new_steps=outcome.new_steps,
        first_eval=outcome.first_eval,
        last_eval=outcome.last_eval,
        best_step=outcome.best_step,
        best_eval=outcome.best_eval,
        best_checkpoint=next((c.path for c in run.store.all() if c.step == outcome.best_step), None),
        tokens=outcome.tokens,
        seconds=outcome.seconds,
        by_source=losses_by_source(events),
    )


def _print_notes(console: Console, run: Run) -> None:
    """What is known only now: layers that ran in stock form, and the rows of streams."""
    from tunesmith.config.summary import data_lines

    for reason, count in (run.installed.fallbacks if run.installed is not None else {}).items():
        console.print(
            f"note: fused layers ran in stock form {count:,} times: {reason}", style="dim", markup=False
        )
    if run.settings.data.streaming:
        lines = ["rows of the streams, counted again in each pass:", *data_lines(run, training_only=True)]
        console.print("\n".join(lines), style="dim", markup=False, highlight=False, soft_wrap=True)


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
    if run.planned is not None:
        run.planned.regroup(run.trainer.grouping.max_tokens)
    return True


def _answers(run: Run, chatter: Console, questions: Sequence[str], answer_tokens: int) -> list[str]:
    from tunesmith.config.samples import prompt_of_user, stop_of
    from tunesmith.training.sample import sample_answers

    if not questions:
        return []
    prompts = [prompt_of_user(question, run.data.renderer, run.tokenizer).ids for question in questions]
    stop = stop_of(run.causal, run.data.renderer, run.tokenizer)
    with (
        chatter.status("asking the model"),
        run.backend.for_measuring(),
        run.backend.autocast(),
    ):
        return sample_answers(
            run.causal.model, run.tokenizer, prompts, max_new_tokens=answer_tokens, stop=stop
        )
