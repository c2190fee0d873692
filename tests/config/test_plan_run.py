"""What a plan says of other settings is what a plan with those settings says, from the run file on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.config.load import load_settings
from tunesmith.config.plan_run import PlannedRun, plan_run
from tunesmith.planning.cards import CARDS

RUN = """
model: {name: Qwen/Qwen3-4B}
data: {train: [{path: rows.jsonl}]}
train: {sequence_length: 4096, global_batch: 16, steps: 300}
"""
FULL = ("adapter.kind=none", "train.optimizer=adamw_8bit", "train.learning_rate=1e-5")


@pytest.fixture(autouse=True)
def nothing_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)


@pytest.fixture
def planned(tmp_path: Path):
    """Plans a run with overrides on a card."""
    file = tmp_path / "run.yaml"
    file.write_text(RUN)

    def plan(card: str, *overrides: str) -> PlannedRun:
        return plan_run(load_settings(str(file), overrides), CARDS[card], 64 * 2**30)

    return plan


@pytest.mark.parametrize(
    ("card", "overrides"),
    [
        ("RTX-4090", ("model.quantize=nf4", "train.global_batch='32768 tokens'")),
        ("RTX-4090", ("train.global_batch='50000 tokens'", "train.steps='9_000_000 tokens'")),
        ("RTX-4090", ("model.quantize=nf4", "train.steps='9_000_000 tokens'")),
        ("RTX-4090", FULL),
        ("L40S", FULL),
        ("L40S", (*FULL, "model.dtype=bfloat16")),
        ("H100-80GB", ("adapter.kind=none", "train.learning_rate=1e-5")),
        ("H100-80GB", (*FULL, "train.global_batch='100000 tokens'")),
        ("H100-80GB", (*FULL, "model.name=meta-llama/Llama-3.1-8B", "train.optimizer=adamw")),
        ("V100-32GB", (*FULL, "model.name=HuggingFaceTB/SmolLM2-135M")),
    ],
)
def test_what_is_said_of_other_settings_is_what_a_plan_with_them_says(planned, card, overrides):
    plan = planned(card, *overrides).plan
    others = (*plan.nearest, *plan.alternatives)

    assert others
    for other in others:
        again = planned(other.summary.card, *overrides, *other.settings)
        assert again.plan.summary == other.summary, other.what


def test_rows_of_half_the_length_take_as_long_a_step_where_it_is_given_in_tokens(planned):
    """Twice as many rows: less attention and nothing else."""
    plan = planned("RTX-4090", "model.quantize=nf4", "train.global_batch='65536 tokens'").plan
    half = plan.alternatives[-1].summary

    assert plan.alternatives[-1].settings == ("train.sequence_length=2048",)
    assert 0.8 < half.step_seconds / plan.step_seconds < 1
