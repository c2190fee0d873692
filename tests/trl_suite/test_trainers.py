"""The trainers of TRL and transformers on our layers and through our door: the stock model's losses and weights."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from tests.trl_suite.trainers import STEPS, TRAINERS, run, tiny_adapted
from tunesmith.models.attach import attach

CASES = {
    **{kind: (kind, {}) for kind in TRAINERS},
    "Trainer, nothing recomputed": ("Trainer", {"gradient_checkpointing": False}),
    "SFT, nothing recomputed": ("SFT", {"gradient_checkpointing": False}),
    "SFT, packing": ("SFT", {"packing": True}),
    "SFT, padding-free": ("SFT", {"padding_free": True, "max_length": None}),
    "SFT, reentrant": ("SFT", {"gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    "GRPO, nothing recomputed": ("GRPO", {"gradient_checkpointing": False}),
}
GENERATES = {"GRPO": ({"a KV cache"}, {"a ready-made attention mask"})}
"""Why generation is not packed, and why it is not fused: it keeps a cache, and its prompts are padded."""

PADDED = {name for name in CASES if "packing" not in name and "free" not in name}


@functools.cache
def _stock(case: str, folder: Path) -> tuple[list[float], dict[str, torch.Tensor], Any]:
    kind, changes = CASES[case]
    return run(kind, folder, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trl")


@pytest.mark.parametrize("fused", [False, True], ids=["stock layers", "fused layers"])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_weights_are_those_of_the_stock_model(case, fused, folder):
    kind, changes = CASES[case]
    expected, trained, _ = _stock(case, folder)
    losses, ours, attached = run(kind, folder, lambda model: attach(model, fused=fused), **changes)

    assert len(losses) == len(expected) == 2 * STEPS
    assert losses == pytest.approx(expected, abs=1e-5)
    before = dict(tiny_adapted(score=kind == "Reward").named_parameters())
    moved = max(float((trained[n] - before[n].detach()).abs().max()) for n in trained if n in before)
    assert moved > 1e-3, "nothing was learned, so the next line proves nothing"
    for name, parameter in trained.items():
        torch.testing.assert_close(ours[name], parameter, atol=1e-5, rtol=1e-5, msg=name)

    door = attached.door
    assert door.packed >= 2 * STEPS
    assert (door.padding > 0) == (case in PADDED)
    unpacked, unfused = GENERATES.get(kind, (set(), set()))
    assert set(door.stock) == unpacked
    if fused:
        assert len(attached.installed.fused) == 2
        assert set(attached.installed.fallbacks) == unfused


@pytest.mark.parametrize("fused", [False, True], ids=["stock layers", "fused layers"])
@pytest.mark.parametrize("kind", ["Trainer", "SFT"])
def test_evaluation_goes_through_the_door(kind, fused, tmp_path):
    losses = []
    for wanted in (False, True):
        model = tiny_adapted()
        attached = attach(model, fused=fused) if wanted else None
        trainer = TRAINERS[kind](model, tmp_path)
        losses.append(trainer.evaluate(trainer.train_dataset.select(range(8)))["eval_loss"])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert attached.door.packed == 1
    assert attached.door.padding > 0
    assert not attached.door.stock
