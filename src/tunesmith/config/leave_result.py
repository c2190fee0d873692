"""The result of a run: the weights of its last step, or those with the lowest held-out loss, with a card."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from tunesmith.config.assemble import Run
from tunesmith.config.run_dir import resolved_yaml, versions
from tunesmith.export.card import Facts
from tunesmith.export.result import save_result
from tunesmith.training.cadence import Outcome
from tunesmith.training.snapshot import restore_weights


@dataclass(frozen=True, slots=True)
class Left:
    """A result, and the step whose weights it has."""

    path: Path
    step: int


def leave_result(run: Run, folder: Path, outcome: Outcome, console: Console) -> Left:
    """Write the result of a run that is over; with `output.result: best` the model has the best weights afterwards.

    Raises:
        StorageError: the disk is full or the folder cannot be written; checkpoints and an older result are intact.
    """
    if run.settings.output.result == "best":
        outcome = _take_best(run, outcome, console)
    return Left(_save(run, folder, outcome), outcome.step)


def _take_best(run: Run, outcome: Outcome, console: Console) -> Outcome:
    """Give the model the weights of the best checkpoint; the outcome as if the run had ended there."""
    best = run.store.best()
    if best is None or best.step == outcome.step:
        return outcome
    damage = best.damage()
    if damage is not None:
        console.print(
            f"warning: the best checkpoint {best.path} is damaged ({damage}); the result has the weights of step "
            f"{outcome.step}.",
            style="yellow",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        return outcome
    tokens = restore_weights(run.backend, best)
    return replace(outcome, step=best.step, last_eval=best.metric, all_tokens=tokens)


def _save(run: Run, folder: Path, outcome: Outcome) -> Path:
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
        positions=_positions(run),
    )
    with run.backend.for_measuring():
        return save_result(
            folder / ("adapter" if adapter else "model"),
            model=run.causal.model,
            tokenizer=run.tokenizer,
            chat_template=run.data.renderer.template_source,
            dtype=run.causal.compute_dtype,
            facts=facts,
            files={"run.yaml": resolved_yaml(settings)},
        )


def _positions(run: Run) -> dict[str, object] | None:
    """What of the model's config has its positions stretched; None where the run did not stretch them."""
    if run.settings.model.rope_scaling is None:
        return None
    text = run.causal.base.config.get_text_config()
    return {name: getattr(text, name) for name in ("rope_parameters", "max_position_embeddings")}
