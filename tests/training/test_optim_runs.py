"""Optimizers and groups in whole runs: what is measured and left behind, and what has to stay when a run goes on."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from tests.support.runs import build, run_settings, train
from tunesmith.config.summary import print_plan
from tunesmith.contracts.errors import UserError
from tunesmith.training import optim
from tunesmith.training.checkpoint import Checkpoint
from tunesmith.training.evaluate import held_out_loss

SCHEDULE_FREE = {"optimizer": "schedule_free_adamw", "scheduler": "constant"}
GROUPS = [{"match": "embed_tokens", "learning_rate": 1e-4, "weight_decay": 0.0}]


def settings(model_dir: Path, folder: Path, train: dict[str, Any], **output: Any) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    return run_settings(model_dir, folder, adapter={"kind": "none"}, train=train, output=output)


def newest(run: Any) -> Checkpoint:
    found = run.store.newest_intact(lambda path, reason: pytest.fail(f"{path}: {reason}"))
    assert found is not None
    return found


def test_a_schedule_free_run_is_the_same_however_often_it_is_measured(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    pytest.importorskip("schedulefree")
    often, seen = build(settings(tiny_model_dir, tmp_path / "often", SCHEDULE_FREE, eval_every=1))
    seldom, _ = build(settings(tiny_model_dir, tmp_path / "seldom", SCHEDULE_FREE))
    for run in (often, seldom):
        with run.packed():
            run.trainer.train()
    one, other = newest(often).tensors(), newest(seldom).tensors()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)

    def measured() -> float:
        with often.packed():
            return held_out_loss(
                often.causal,
                often.data.corpus,
                often.data.held_out_N,
                max_tokens=often.fit.tokens,
                autocast=often.backend.autocast(),
            ).loss

    last = seen.of("eval")[-1].loss
    assert measured() != last, "outside, the model is where gradients are taken"
    with often.backend.for_measuring():
        assert measured() == last


def test_a_schedule_free_result_is_the_average(tiny_model_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("schedulefree")
    plain = settings(tiny_model_dir, tmp_path, SCHEDULE_FREE)
    result = train(plain)
    assert result.result is not None
    left = load_file(result.result / "model.safetensors")
    again, _ = build(plain)
    again.trainer.resume(newest(again))
    name = "model.layers.0.mlp.up_proj.weight"
    trained = dict(again.causal.model.named_parameters())[name]
    assert not torch.equal(left[name], trained)
    with again.backend.for_measuring():
        assert torch.equal(left[name], trained)


def test_groups_are_kept_by_a_run_and_unknown_to_runs_without(tiny_model_dir: Path, tmp_path: Path) -> None:
    plain = settings(tiny_model_dir, tmp_path, {"steps": 2, "optimizer": "adamw"})
    run, _ = build(plain)
    assert "train.groups" not in run.trainer.identity, "runs from before there were groups go on"
    plain["train"]["groups"] = GROUPS
    run, _ = build(plain)
    with run.packed():
        run.trainer.train()
    again, _ = build(plain)
    again.trainer.resume(newest(again))
    changed, _ = build(plain | {"train": plain["train"] | {"groups": []}})
    with pytest.raises(UserError, match=r"train\.groups was \[\{'match': 'embed_tokens'"):
        changed.trainer.resume(newest(changed))


def test_the_plan_says_what_a_pattern_found(tiny_model_dir: Path, tmp_path: Path) -> None:
    groups = [*GROUPS, {"match": r"layers\.1\..*_proj", "learning_rate": 2e-3}]
    train = {"groups": groups, "learning_rate": 1e-3, "weight_decay": 0.1, "optimizer": "muon"}
    run, _ = build(settings(tiny_model_dir, tmp_path, train))
    console = Console(file=io.StringIO(), width=400)
    print_plan(console, run)
    printed = console.file.getvalue()
    # 384 tokens of 32; q and o of 32 by 32, k and v of 32 by 16, three of 32 by 64
    assert "embed_tokens: 1 tensor, 12.3K parameters; learning rate 1.00e-04, weight decay 0\n" in printed
    assert (
        r"layers\.1\..*_proj: 7 tensors, 9.2K parameters; learning rate 2.00e-03, weight decay 0.1" in printed
    )


def test_a_pattern_that_matches_nothing_ends_a_run_before_it_starts(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    groups = [{"match": "embedd", "learning_rate": 1e-4}]
    with pytest.raises(UserError, match=r"train\.groups\.0\.match: 'embedd' matches no parameter") as caught:
        build(settings(tiny_model_dir, tmp_path, {"groups": groups}))
    assert "model.embed_tokens.weight" in str(caught.value.hint)


def test_a_missing_package_is_noticed_before_data_is_read(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = settings(tiny_model_dir, tmp_path, {"optimizer": "adamw_torch_4bit"})
    Path(plain["data"]["train"][0]["path"]).unlink()
    find = optim.importlib.util.find_spec
    monkeypatch.setattr(
        optim.importlib.util, "find_spec", lambda name: None if name == "torchao" else find(name)
    )
    with pytest.raises(UserError, match="package torchao"):
        build(plain)
