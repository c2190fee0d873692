"""Ours and the peers do the same step: on the same weights and tokens their losses agree, in every layout."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks.shapes import save_checkpoint

from tests.benchmarks.tiny import SHAPE, tiny_work

TOLERANCE = 1e-4  # float32, losses near 6.5, printed to four digits


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        save_checkpoint(folder, SHAPE)
    return folder


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def losses(rows: Any) -> dict[str, list[float]]:
    rows = list(rows)
    assert all(row["status"] == "ok" for row in rows)
    return {row["layout"]: row["losses"] for row in rows}


def ours(checkpoint: Path, policy: str = "keep", **changes: Any) -> list[float]:
    from benchmarks.peers import with_tunesmith

    work = tiny_work(checkpoint, ["packed"], options={"policy": policy}, **changes)
    return losses(with_tunesmith.measure(work))["packed"]


def stock(checkpoint: Path, layouts: list[str], *, checkpointing: bool = False, **changes: Any) -> Any:
    from benchmarks.peers import with_transformers

    options = {"liger": False, "checkpointing": checkpointing}
    return losses(with_transformers.measure(tiny_work(checkpoint, layouts, options=options, **changes)))


def test_stock_and_ours_lose_the_same(checkpoint):
    expected = stock(checkpoint, ["rows"])["rows"]

    assert ours(checkpoint) == pytest.approx(expected, abs=TOLERANCE)
    assert ours(checkpoint, "recompute") == pytest.approx(expected, abs=TOLERANCE)
    assert stock(checkpoint, ["rows"], checkpointing=True)["rows"] == pytest.approx(expected, abs=TOLERANCE)
    assert expected[0] > expected[-1], "it trains"


def test_a_planned_step_loses_the_same_and_says_what_was_foreseen(checkpoint):
    from benchmarks.peers import with_tunesmith

    options = {"policy": "plan", "budget": 0.92}
    (row,) = with_tunesmith.measure(tiny_work(checkpoint, ["packed"], options=options))

    assert row["losses"] == pytest.approx(ours(checkpoint), abs=TOLERANCE)
    assert (row["layout"], row["plan"]) == ("packed", "2 × keep_all")
    assert row["foreseen_peak_gib"] > 0
    assert row["fits"]


def test_full_fine_tuning_loses_the_same(checkpoint, monkeypatch):
    """With an optimizer that rounds alike in both, which those of 8 bits do not."""
    from benchmarks.peers import tables

    monkeypatch.setitem(tables.OPTIMIZERS, "full", ("adamw", 2e-3))
    expected = stock(checkpoint, ["rows"], adapter="full")["rows"]

    assert ours(checkpoint, adapter="full") == pytest.approx(expected, abs=TOLERANCE)
    assert ours(checkpoint, "recompute", adapter="full") == pytest.approx(expected, abs=TOLERANCE)
    assert stock(checkpoint, ["rows"], checkpointing=True, adapter="full")["rows"] == pytest.approx(
        expected, abs=TOLERANCE
    )
    assert expected[0] - expected[-1] > 0.01, "it trains"


def test_full_fine_tuning_is_with_8_bits(checkpoint, monkeypatch):
    from benchmarks.peers import measure

    built = []

    def adamw_8bit(trained, rate):
        built.append(rate)
        return torch.optim.AdamW(trained, lr=rate)

    monkeypatch.setitem(measure.PEERS_OPTIMIZERS, "adamw_8bit", adamw_8bit)
    expected = stock(checkpoint, ["rows"], adapter="full")["rows"]
    assert built == [2e-5]
    assert ours(checkpoint, adapter="full") == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("supervised", [1.0, 0.3])
def test_packed_and_padded_documents_lose_the_same(checkpoint, supervised):
    changes = {"mean": 20, "supervised": supervised}

    found = stock(checkpoint, ["packed", "padded"], **changes)

    expected = ours(checkpoint, **changes)
    # the last loss as well: each layout starts from the same adapter
    assert found["packed"] == pytest.approx(expected, abs=TOLERANCE)
    assert found["padded"] == pytest.approx(expected, abs=TOLERANCE)


def test_a_row_says_what_was_done(checkpoint):
    from benchmarks.peers import with_transformers

    options = {"liger": False, "checkpointing": False}
    work = tiny_work(checkpoint, ["packed", "padded"], options=options, mean=20, supervised=0.5)

    packed, padded = with_transformers.measure(work)

    assert packed["tokens"] == padded["tokens"] == packed["positions"] == 96
    assert padded["positions"] > 96
    assert packed["batch"] == padded["batch"]
    assert 0 < packed["supervised"] < 80
    assert packed["tokens_per_second"] == pytest.approx(96 / packed["step_seconds"], rel=0.05)
    assert packed["flops"] > 0


def test_out_of_memory_in_one_layout_leaves_the_other(checkpoint, monkeypatch):
    from benchmarks.peers import measure, with_transformers

    calls = []

    def loop(step, **arguments):
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried 20 GiB\nmore")
        return time_steps(step, **arguments)

    time_steps = measure.time_steps
    monkeypatch.setattr(measure, "time_steps", loop)
    options = {"liger": False, "checkpointing": False}

    rows = list(with_transformers.measure(tiny_work(checkpoint, ["packed", "padded"], options=options)))

    assert [row["status"] for row in rows] == ["oom", "ok"]
    assert rows[0]["reason"] == "CUDA out of memory. Tried 20 GiB"


class _Unsloth(SimpleNamespace):
    """The calls of Unsloth's interface that are used, over transformers and PEFT."""

    seen: list[Any] = []  # noqa: RUF012

    @classmethod
    def from_pretrained(cls, *, model_name, max_seq_length, dtype, load_in_4bit):
        from transformers import AutoModelForCausalLM

        cls.seen.append((max_seq_length, load_in_4bit))
        model = AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype)
        model.config.use_cache = False
        forward = model.forward

        def with_lengths(*args, packed_seq_lengths=None, **kwargs):
            cls.seen.append(packed_seq_lengths)
            return forward(*args, **kwargs)

        model.forward = with_lengths
        return model, None

    @staticmethod
    def get_peft_model(model, *, use_gradient_checkpointing, random_state, target_modules, **settings):
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(random_state)
        return get_peft_model(model, LoraConfig(target_modules=target_modules, **settings))

    @staticmethod
    def for_training(model):
        model.train()


def test_unsloth_is_told_the_lengths_of_packed_documents(checkpoint, monkeypatch):
    module = ModuleType("unsloth")
    module.FastLanguageModel = _Unsloth  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "unsloth", module)
    monkeypatch.delitem(sys.modules, "benchmarks.peers.with_unsloth", raising=False)
    monkeypatch.setattr(_Unsloth, "seen", [])
    from benchmarks.peers import with_unsloth

    work = tiny_work(checkpoint, ["packed", "padded"], options={"checkpointing": "unsloth"}, mean=20)
    found = losses(with_unsloth.measure(work))

    loaded, *lengths = _Unsloth.seen
    assert loaded == (96, False)
    assert all(int(each.sum()) == 96 and each.dtype == torch.int32 for each in lengths[:3])
    assert lengths[3:] == [None] * 3
    assert found["packed"][0] == pytest.approx(ours(checkpoint, mean=20)[0], abs=TOLERANCE)
    assert found["packed"] == pytest.approx(found["padded"], abs=TOLERANCE)
