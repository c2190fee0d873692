"""One rule for the best of held-out losses, wherever it is asked for."""

from __future__ import annotations

import math
from pathlib import Path

from tests.support.fake_runs import START, end, evaluated
from tunesmith.contracts.best import best_step
from tunesmith.contracts.events import Evaluated
from tunesmith.export.run_report import loss_sentence
from tunesmith.export.run_summary import Recorded, summarise
from tunesmith.training.checkpoint import CheckpointStore
from tunesmith.training.figures import Figures


def test_it_is_the_latest_of_the_lowest_finite_losses() -> None:
    assert best_step({}) is None
    assert best_step({0: math.nan, 5: math.inf}) is None
    assert best_step({0: 3.0, 10: 2.0, 20: 2.0, 30: math.nan}) == 20
    assert best_step({20: 2.0, 10: 2.0}) == 20  # whatever their order


def test_all_who_name_the_best_step_name_the_same(tmp_path: Path) -> None:
    losses = {0: 3.0, 5: 2.0, 10: 2.0, 15: 2.5}
    store, figures = CheckpointStore(tmp_path, keep=4), Figures()
    for step, loss in losses.items():
        store.save(step, {}, {}, metric=loss)
        figures.take(Evaluated(step=step, loss=loss, tokens=1, seconds=0.1))
    events = [{"event": "start", "step": 0, **START}, *(evaluated(*each) for each in losses.items()), end(15)]
    summary = summarise(tmp_path, events, {}, running=False)

    best = store.best()
    assert best is not None
    assert (best.step, best.metric) == (10, 2.0)
    assert figures.best == (10, 2.0)
    assert (summary.best_step, summary.best_eval) == (10, 2.0)
    assert "lowest at step 10, with 2.0000" in loss_sentence(Recorded(tmp_path, events, {}, summary))
