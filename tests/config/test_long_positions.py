"""A run with stretched positions, from its settings to what its result computes elsewhere."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.runs import build, run_settings, train
from tests.support.tiny import save_tiny_model, tiny_config
from tunesmith import FastLanguageModel
from tunesmith.config.find_result import find_result
from tunesmith.config.load import load_settings
from tunesmith.config.load_result import load_result
from tunesmith.config.make_model import position_warnings
from tunesmith.config.merge_result import merge_result
from tunesmith.models.rope_scaling import stretch

YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base") / "model", max_position_embeddings=32)


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that trained an adapter on stretched positions."""
    settings = run_settings(
        base, tmp_path_factory.mktemp("run"), model={"rope_scaling": YARN}, train={"steps": 2}
    )
    return train(settings).dir


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(3, 123)[None]).logits
    return found


def test_the_result_is_read_with_the_positions_that_it_was_trained_with(run: Path, base: Path) -> None:
    loaded = load_result(find_result(str(run)))
    assert loaded.context == 128
    plain = FastLanguageModel.from_pretrained(
        str(run / "adapter"),
        load_in_4bit=False,
        quiet=True,
        rope_scaling={"rope_type": "linear", "factor": 1.0},
    )
    assert not torch.allclose(logits(loaded.model), logits(plain[0].eval()), atol=1e-3)
    again, _ = FastLanguageModel.from_pretrained(str(run / "adapter"), load_in_4bit=False, quiet=True)
    torch.testing.assert_close(logits(loaded.model), logits(again.eval()))


def test_the_card_says_how_to_load_it(run: Path, tmp_path: Path) -> None:
    card = (run / "adapter" / "README.md").read_text()
    assert "positions stretched beyond the base's own (`model.rope_scaling` in `run.yaml`)" in card
    code = re.findall(r"```python\n(.*?)```", card, re.S)[0].replace("FOLDER", str(run / "adapter"))
    (tmp_path / "use.py").write_text(code)
    theirs = runpy.run_path(str(tmp_path / "use.py"))["model"].eval()
    torch.testing.assert_close(logits(theirs), logits(load_result(find_result(str(run))).model))


def test_a_merged_model_has_them_in_its_config(run: Path, tmp_path: Path) -> None:
    merge_result(
        find_result(str(run)),
        tmp_path / "merged",
        dtype=torch.float32,
        max_shard_size="5GB",
        verify=False,
        say=lambda _: None,
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.rope_parameters["rope_type"] == "yarn"
    expected = logits(load_result(find_result(str(run))).model)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)


def test_they_stay_the_same_while_a_run_goes_on(base: Path, tmp_path: Path) -> None:
    stretched, _ = build(run_settings(base, tmp_path, model={"rope_scaling": YARN}))
    assert stretched.trainer.identity["model.rope_scaling"]["factor"] == 4.0
    assert stretched.warnings == ()
    plain, _ = build(run_settings(base, tmp_path))
    assert "model.rope_scaling" not in plain.trainer.identity, "older checkpoints have no such name"
    assert plain.warnings == (
        "train.sequence_length is 128, and the model was made for 32 positions. For documents longer than that, "
        "set model.rope_scaling, such as {rope_type: yarn, factor: 4.0}.",
    )


@pytest.mark.parametrize(
    ("scaling", "length", "warning"),
    [
        (YARN, 128, None),
        (
            YARN,
            129,
            "model.rope_scaling reaches 128 positions. For documents longer than that, raise its factor to 4.1.",
        ),
        (YARN, 192, "raise its factor to 6.0."),
        ({"rope_type": "dynamic", "factor": 2.0}, 4096, None),
        (None, 33, "such as {rope_type: yarn, factor: 2.0}"),
    ],
)
def test_rows_longer_than_positions_reach(scaling: Any, length: int, warning: str | None) -> None:
    config = tiny_config(max_position_embeddings=32)
    if scaling is not None:
        stretch(config, scaling)
    settings = load_settings(
        {
            "model": {"name": "x", "rope_scaling": scaling},
            "data": {"train": [{"path": "a"}]},
            "train": {"sequence_length": length},
        }
    )
    found = position_warnings(settings, config)
    assert len(found) == (warning is not None)
    assert warning is None or warning in found[0]


def test_an_adapter_that_goes_on_with_other_positions(run: Path) -> None:
    def found(scaling: Any) -> tuple[str, ...]:
        settings = {
            "model": {"name": "x", "rope_scaling": scaling},
            "adapter": {"path": str(run / "adapter")},
            "data": {"train": [{"path": "a"}]},
            "train": {"sequence_length": 32},
        }
        return position_warnings(load_settings(settings), tiny_config())

    assert found(YARN) == ()
    (warning,) = found(None)
    assert (
        "was trained with model.rope_scaling {'rope_type': 'yarn', 'factor': 4.0}, and this run has none"
        in warning
    )
