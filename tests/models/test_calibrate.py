"""Rates from timed calls, on a CPU and with a clock of the test's own; what goes wrong leaves the table's rates."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tunesmith.kernels.attention import attention_forward
from tunesmith.models import calibrate as module
from tunesmith.models.calibrate import IN_STEPS, Calibration, calibrate
from tunesmith.planning.amounts import LayerAmounts
from tunesmith.planning.cards import CARDS, Rates
from tunesmith.planning.facts import LayerFacts, Work

LAYER = LayerFacts(hidden=16, inner=32, heads=4, kv_heads=2, head_dim=8, rotary_dim=8)
WORK = Work(documents=(20, 12), supervised=10)
CPU = torch.device("cpu")
BYTES = 1 << 12


@pytest.fixture(autouse=True)
def small_copies(monkeypatch):
    monkeypatch.setattr(module, "COPIED_BYTES", BYTES)


class Clock:
    """Says that every call takes `seconds`, after it has been made once; the host link's second way takes twice."""

    def __init__(self, seconds: float = 1e-3) -> None:
        self.seconds, self.calls = seconds, 0

    def __call__(self, call: Callable[[], object]) -> float:
        call()
        self.calls += 1
        return self.seconds * (2 if self.calls == 11 else 1)


def believing(clock_seconds: float = 1e-3, layer: LayerFacts = LAYER, work: Work = WORK) -> Rates:
    """Rates of a table that such a clock's figures are near to."""
    counted = LayerAmounts(layer, work, work.tokens)
    return replace(
        CARDS["H100-80GB"].rates(),
        products=2.0 * work.tokens * layer.matrix_parameters / 4 / clock_seconds,
        memory=2 * BYTES / clock_seconds,
        host_link=BYTES / clock_seconds,
        attention_forward=counted.attended(0) / clock_seconds,
        attention_backward=counted.attended(1) / clock_seconds,
    )


def run(table: Rates, clock: Callable[[Callable[[], object]], float], **options) -> Calibration:
    return calibrate(LAYER, WORK, table, CPU, torch.float32, timer=clock, **options)


def test_rates_are_work_over_time():
    clock, table = Clock(), believing()
    found = run(table, clock)
    # four groups of two GEMMs, a copy, two ways of the link, attention forward and backward
    assert clock.calls == 8 + 1 + 2 + 2
    rates = found.rates
    parameters = 64 * 16 + 16 * 32 + 64 * 16 + 16 * 32
    assert LAYER.matrix_parameters == parameters
    assert rates.products == pytest.approx(IN_STEPS["products"] * 2 * 2 * 32 * parameters / 8e-3)
    assert rates.memory == pytest.approx(2 * BYTES / 1e-3)
    assert rates.host_link == pytest.approx(BYTES / 2e-3)
    counted = LayerAmounts(LAYER, WORK, 32)
    assert rates.attention_forward == pytest.approx(
        IN_STEPS["attention_forward"] * counted.attended(0) / 1e-3
    )
    assert rates.attention_backward == pytest.approx(
        IN_STEPS["attention_backward"] * counted.attended(1) / 1e-3
    )
    assert (rates.host_layer, rates.kernel) == (table.host_layer, table.kernel)
    assert not rates.estimated
    assert rates.source == "measured on this card"
    assert found.note == ""


def test_an_outcome_is_remembered(tmp_path):
    clock, table = Clock(), believing()
    first = run(table, clock, memory=tmp_path / "rates")
    again = run(table, clock, memory=tmp_path / "rates")
    assert again == first
    assert clock.calls == 13
    (file,) = (tmp_path / "rates").iterdir()
    assert file.suffix == ".json"
    calibrate(
        replace(LAYER, inner=64), WORK, table, CPU, torch.float32, timer=clock, memory=tmp_path / "rates"
    )
    assert clock.calls == 26


@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"products": "fast"}', "nan", None])
def test_a_damaged_outcome_is_measured_again(tmp_path, damage):
    clock, table = Clock(), believing()
    first = run(table, clock, memory=tmp_path)
    (file,) = tmp_path.iterdir()
    if damage is None:
        rates = json.loads(file.read_text())
        damage = json.dumps(rates | {"memory": -1.0})
    file.write_text(damage)
    clock.calls = 0
    assert run(table, clock, memory=tmp_path) == first
    assert clock.calls == 13


def test_a_folder_that_cannot_be_written_hurts_nobody(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert run(believing(), Clock(), memory=blocked / "rates").note == ""


def test_a_failure_leaves_the_table(tmp_path):
    def broken(_call: Callable[[], object]) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore lines")

    table = believing()
    found = run(table, broken, memory=tmp_path)
    assert found.rates == table
    assert found.note == (
        "The card's rates could not be measured, the table's are used "
        "(OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.)."
    )
    assert list(tmp_path.iterdir()) == []


def test_a_clock_that_stands_still_leaves_the_table():
    table = believing()
    found = run(table, lambda call: 0.0)
    assert found.rates == table
    assert "ZeroDivisionError" in found.note


@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_what_cannot_be_is_not_believed(tmp_path, factor):
    table = replace(believing(), memory=factor * 2 * BYTES / 1e-3)
    found = run(table, Clock(), memory=tmp_path)
    assert found.rates.memory == table.memory
    # the others stand
    assert found.rates.host_link == pytest.approx(BYTES / 2e-3)
    assert found.note.startswith("Rates that cannot be were measured, the table's are used: memory ")
    assert list(tmp_path.iterdir()) == []
    assert found.rates.estimated == table.estimated


def test_random_numbers_of_the_run_stay_as_they_are():
    before = torch.get_rng_state()
    run(believing(), Clock())
    assert torch.equal(torch.get_rng_state(), before)


def test_long_rows_are_cut(monkeypatch):
    monkeypatch.setattr(module, "TOKENS", 24)
    monkeypatch.setattr(module, "ELEMENTS", 64 * 10)
    assert module._documents((20, 12, 9)) == (20, 4)
    assert module._documents((50,)) == (24,)
    assert module._documents((10, 14, 1)) == (10, 14)
    shapes = []

    def clock(call: Callable[[], object]) -> float:
        result = call()
        if isinstance(result, torch.Tensor) and result.ndim == 2:
            shapes.append(result.shape[0])
        return 1e-3

    run(believing(), clock)
    # qkv and gate_up are 64 wide, the others 32; then the gradient of attention
    assert shapes == [10, 10, 20, 20, 10, 10, 20, 20, 24]


@pytest.mark.parametrize(("window", "capped"), [(7, False), (None, True), (None, False)])
def test_windows_and_caps_of_the_layer_are_measured(monkeypatch, window, capped):
    layer = replace(LAYER, window=window, softcap=capped)
    seen = []

    def spying(*arguments, scores, **options):
        seen.append((scores.window, scores.softcap is not None))
        return attention_forward(*arguments, scores=scores, **options)

    monkeypatch.setattr(module, "attention_forward", spying)
    found = calibrate(layer, WORK, believing(layer=layer), CPU, torch.float32, timer=Clock())
    assert set(seen) == {(window, capped)}
    counted = LayerAmounts(layer, WORK, 32)
    assert found.rates.attention_forward == pytest.approx(
        IN_STEPS["attention_forward"] * counted.attended(0) / 1e-3
    )


def test_the_clock_counts_calls_in_a_row():
    made = []
    assert module._clock(CPU)(lambda: made.append(sum(range(2000)))) > 0.0
    assert len(made) == 2 + module.CALLS
