"""The type of weights in full fine-tuning: what asks for bfloat16, when `auto` takes it, that the plan says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.runs import build, run_settings
from tests.support.tiny import tiny_llama
from tunesmith.config import summary
from tunesmith.config.load import load_settings
from tunesmith.config.make_model import weights_dtype
from tunesmith.models.adapter import train_all
from tunesmith.models.loader import load_skeleton
from tunesmith.planning.fit import ROUNDING, STATE_BYTES, USABLE
from tunesmith.training.optim import OPTIMIZERS

LARGE = 2**40


def settings(folder: Path, tiny_model_dir: Path, optimizer: str = "adamw_8bit", **model: Any) -> Any:
    return load_settings(
        run_settings(
            tiny_model_dir,
            folder,
            adapter={"kind": "none"},
            model=model,
            train={"optimizer": optimizer, "scheduler": "constant"},
        )
    )


def test_the_tables_name_the_same_optimizers():
    assert set(STATE_BYTES) == set(OPTIMIZERS)
    assert set(ROUNDING) <= set(OPTIMIZERS)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("asked", ["auto", "bfloat16"])
def test_what_is_asked_for_needs_an_optimizer_that_rounds(optimizer, asked, tmp_path, tiny_model_dir):
    made = settings(tmp_path, tiny_model_dir, optimizer, dtype=asked)
    rounds = asked == "bfloat16" and optimizer in ROUNDING
    assert weights_dtype(made, torch.bfloat16, LARGE) == (torch.bfloat16 if rounds else torch.float32)
    assert weights_dtype(made, torch.float32, 0) == torch.float32, "no autocast, no bfloat16"
    assert weights_dtype(made, torch.float16, 0) == torch.float32


@pytest.mark.parametrize(("optimizer", "state"), [("adamw", 8.0), ("adamw_8bit", 2.03125)])
def test_auto_takes_bfloat16_where_float32_would_not_fit(optimizer, state, tmp_path, tiny_model_dir):
    """4 bytes of weight, 4 of gradient and the state of each trained parameter, 2 of each frozen one."""
    made = settings(tmp_path, tiny_model_dir, optimizer, freeze=["model.embed_tokens.*"])
    sizes = {name: p.numel() for name, p in tiny_llama().named_parameters()}
    frozen = sizes["model.embed_tokens.weight"]
    needed = ((8 + state) * (sum(sizes.values()) - frozen) + 2 * frozen) / USABLE
    assert weights_dtype(made, torch.bfloat16, int(needed) + 2) == torch.float32
    assert weights_dtype(made, torch.bfloat16, int(needed) - 2) == torch.bfloat16


def test_a_skeleton_has_the_parameters_and_ties_of_the_model(tiny_model_dir):
    skeleton, model = load_skeleton(str(tiny_model_dir)), tiny_llama()
    shapes = [{name: p.shape for name, p in m.named_parameters()} for m in (skeleton, model)]
    assert shapes[0] == shapes[1]
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}


def test_trained_and_frozen_weights_have_types_of_their_own():
    model = train_all(tiny_llama(), ["*norm*"], torch.float32, torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if "norm" in name else torch.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        ("auto", "parameters in float32 on cpu; all parameters"),
        ("bfloat16", "computed in bfloat16 and rounded stochastically"),
    ],
)
def test_the_plan_says_what_the_weights_are(dtype, said, tmp_path, tiny_model_dir):
    plain = run_settings(
        tiny_model_dir,
        tmp_path,
        adapter={"kind": "none"},
        model={"dtype": dtype},
        train={"optimizer": "adamw_8bit"},
    )
    run, _ = build(plain)
    assert said in summary._model_line(run)
    assert ("type of the trained weights" in run.trainer.identity) == (dtype == "bfloat16")
