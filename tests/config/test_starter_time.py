"""How long a run takes without a GPU, as far as that can be told."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.cli.init import rough_span
from tunesmith.config import starter_time
from tunesmith.config.starter import Sizes
from tunesmith.config.starter_time import CORE_RATES, seconds_on_cpu

MODEL = "HuggingFaceTB/SmolLM2-135M"
PARAMETERS = 134_515_008  # as published


def sizes(steps: int | None = 75) -> Sizes:
    return Sizes(512, 0, 16, 3, steps, 7, {})


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starter_time, "ask_nvidia_smi", list)
    monkeypatch.setattr(starter_time, "usable_cores", lambda: 2)


def test_all_tokens_of_all_steps_count() -> None:
    expected = [4 * PARAMETERS * 75 * 16 * 512 / (2 * rate) for rate in CORE_RATES]
    assert seconds_on_cpu(MODEL, "lora", sizes()) == pytest.approx(expected)
    assert seconds_on_cpu(MODEL, "none", sizes()) == pytest.approx([1.5 * seconds for seconds in expected])
    assert [*map(rough_span, expected)] == ["55 minutes", "3 hours"]


def test_nothing_is_said_where_nobody_knows_or_a_gpu_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert seconds_on_cpu(MODEL, "lora", sizes(steps=None)) is None
    assert seconds_on_cpu("org/absent", "lora", sizes()) is None
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert seconds_on_cpu(str(tmp_path), "lora", sizes()) is None
    monkeypatch.setattr(starter_time, "ask_nvidia_smi", lambda: [{"name": "NVIDIA H100"}])
    assert seconds_on_cpu(MODEL, "lora", sizes()) is None


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (20.0, "1 minute"),
        (5_000.0, "83 minutes"),
        (7_300.0, "2 hours"),
        (100_000.0, "28 hours"),
        (2e5, "2 days"),
    ],
)
def test_times_are_rough(seconds: float, said: str) -> None:
    assert rough_span(seconds) == said
