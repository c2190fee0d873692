"""When things happen in a run, from its settings: how many steps it has, and what is due after how many of them."""

from __future__ import annotations

from tunesmith.config.prepare_data import PreparedData
from tunesmith.contracts.errors import UserError
from tunesmith.data.feed import TableFeed
from tunesmith.settings.quantities import seconds_of, tokens_of
from tunesmith.settings.run import RunSettings
from tunesmith.training.cadence import Cadence


def count_steps(settings: RunSettings, data: PreparedData) -> int:
    """Optimizer steps of the whole run: given, or those that the tokens or the epochs asked for take."""
    train = settings.train
    if isinstance(train.steps, int):
        return train.steps
    assert isinstance(data.feed, TableFeed), (
        "config.rules asks for a number of steps where the data is streamed"
    )
    tokens = tokens_of(train.steps)
    return data.feed.count_steps(train.epochs) if tokens is None else data.feed.count_steps_of_tokens(tokens)


def make_cadence(settings: RunSettings, data: PreparedData, total_steps: int) -> Cadence:
    """What is due when.

    Raises:
        UserError: the settings need a held-out loss, and no row is held out.
    """
    train, output = settings.train, settings.output
    stopping = train.early_stopping
    if not len(data.held_out_N) and (stopping is not None or output.result == "best"):
        name = "train.early_stopping" if stopping is not None else "output.result: best"
        raise UserError(
            f"{name} needs a held-out loss, and no row of this data is held out.",
            hint="Raise data.eval.fraction, or name sources under data.eval.",
        )
    return Cadence(
        total_steps=total_steps,
        save_every=output.save_every if isinstance(output.save_every, int) else None,
        save_seconds=seconds_of(output.save_every),
        save_best=output.result == "best",
        eval_every=output.eval_every,
        sample_every=output.sample_every,
        patience=stopping.patience if stopping is not None else None,
        min_delta=stopping.min_delta if stopping is not None else 0.0,
        max_seconds=train.max_hours * 3600 if train.max_hours else None,
        max_grad_norm=train.max_grad_norm,
        on_non_finite=train.on_non_finite,
    )
