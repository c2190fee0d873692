"""Rules between settings: each fires alone, and none fires on a run that is right."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith.config.load import load_settings
from tunesmith.config.rules import RULES
from tunesmith.contracts.errors import ConfigError

RIGHT: dict[str, Any] = {"model": {"name": "x"}, "data": {"train": [{"path": "a"}]}}

BROKEN = [
    ({"adapter": {"kind": "none"}, "model": {"quantize": "nf4"}}, ["adapter.kind"]),
    ({"model": {"freeze": ["model.*"]}}, ["model.freeze"]),
    ({"adapter": {"kind": "none", "path": "runs/a"}}, ["adapter.path"]),
    ({"adapter": {"targets": []}}, ["adapter.targets"]),
    ({"model": {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "truncate": True}}},
     ["model.rope_scaling.truncate"]),
    ({"train": {"micro_batch": 17}}, ["train.micro_batch"]),
    ({"adapter": {"last_layers": 1, "layers_to_transform": [0]}}, ["adapter.last_layers"]),
    ({"adapter": {"new_tokens": ["<a>"], "path": "runs/a"}}, ["adapter.new_tokens"]),
    ({"adapter": {"init_lora_weights": "loftq"}}, ["adapter.init_lora_weights"]),
    ({"adapter": {"init_lora_weights": "pissa"}, "model": {"quantize": "int8"}}, ["adapter.init_lora_weights"]),
    ({"adapter": {"kind": "none", "loraplus_lr_ratio": 16.0}}, ["adapter.loraplus_lr_ratio"]),
    ({"adapter": {"kind": "none", "use_dora": True}}, ["adapter.use_dora"]),
    ({"adapter": {"kind": "none", "use_rslora": True}}, ["adapter.use_rslora"]),
    ({"adapter": {"kind": "none", "init_lora_weights": "gaussian"}}, ["adapter.init_lora_weights"]),
    ({"adapter": {"kind": "none", "modules_to_save": ["lm_head"]}}, ["adapter.modules_to_save"]),
    ({"adapter": {"kind": "none", "layers_to_transform": [0]}}, ["adapter.layers_to_transform"]),
    ({"adapter": {"kind": "none", "last_layers": 1}}, ["adapter.last_layers"]),
    ({"adapter": {"kind": "none", "rank_pattern": {"q_proj": 4}}}, ["adapter.rank_pattern"]),
    ({"adapter": {"kind": "none", "alpha_pattern": {"q_proj": 4}}}, ["adapter.alpha_pattern"]),
    ({"adapter": {"last_layers": 1, "targets": ".*q_proj"}}, ["adapter.last_layers"]),
    ({"adapter": {"embedding_learning_rate": 1e-5}}, ["adapter.embedding_learning_rate"]),
    ({"train": {"noise_scale": True, "micro_batch": 16}}, ["train.noise_scale"]),
    ({"data": {"overlong": "split", "overlap": 1025}}, ["data.overlap"]),
    ({"data": {"join_texts": True, "overlap": 1025}}, ["data.overlap"]),
    ({"train": {"optimizer": "muon"}}, ["train.optimizer"]),
    ({"train": {"optimizer": "schedule_free_adamw"}}, ["train.scheduler"]),
    (
        {"train": {"optimizer": "schedule_free_adamw", "scheduler": "constant", "betas": [0.0, 0.9]}},
        ["train.betas"],
    ),
    ({"train": {"groups": [{"match": "norm"}]}}, ["train.groups.0"]),
    ({"train": {"early_stopping": {"patience": 2}}, "output": {"eval_every": None}}, ["train.early_stopping"]),
    ({"output": {"result": "best"}, "data": {"eval": {"fraction": 0.0}}}, ["output.result"]),
    ({"output": {"track": ["tensorboard", "tensorboard"]}}, ["output.track"]),
    ({"parallel": {"tensor": 2}}, ["parallel.tensor"]),
    ({"parallel": {"replicate": 2}}, ["parallel.replicate"]),
    ({"parallel": {"shard": 8}}, ["parallel.shard"]),
    ({"parallel": {"context": 2}}, ["parallel.context"]),
    ({"parallel": {"pipeline": 2}}, ["parallel.pipeline"]),
    ({"adapter": {"kind": "none", "path": "a"}, "parallel": {"tensor": 2}}, ["adapter.path", "parallel.tensor"]),
]  # fmt: skip


def _merged(changes: dict[str, Any]) -> dict[str, Any]:
    return {name: {**RIGHT.get(name, {}), **changes.get(name, {})} for name in {**RIGHT, **changes}}


@pytest.mark.parametrize(("changes", "paths"), BROKEN)
def test_a_broken_rule_is_named_by_its_setting(changes: dict[str, Any], paths: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(_merged(changes))
    assert [problem.where for problem in caught.value.problems] == paths


def test_every_rule_is_tested() -> None:
    tested = {path for _, paths in BROKEN for path in paths}
    assert {".".join(rule.path) for rule in RULES} <= tested


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"adapter": {"kind": "none"}, "model": {"freeze": ["model.embed_tokens.*"]}},
        {"adapter": {"kind": "none", "targets": []}},
        {"adapter": {"path": "runs/a"}, "model": {"quantize": "nf4"}},
        {"adapter": {"init_lora_weights": "loftq"}, "model": {"quantize": "nf4"}},
        {"adapter": {"init_lora_weights": "pissa", "last_layers": 2, "new_tokens": ["<a>"]}},
        {"train": {"micro_batch": 16, "global_batch": 16}},
        {"data": {"overlong": "split", "overlap": 1024}},
        {"data": {"overlap": 5000}},
        {"memory": {"policy": "offload_attention"}},
        {"adapter": {"kind": "none"}, "memory": {"policy": "recompute"}},
        {
            "adapter": {"kind": "none"},
            "model": {"freeze": ["model.layers.0.*"]},
            "memory": {"policy": "offload"},
        },
        {"train": {"micro_batch": 64, "global_batch": "8192 tokens"}},
        {"train": {"early_stopping": {"patience": 2}}, "output": {"result": "best"}},
    ],
)
def test_what_is_right_breaks_no_rule(changes: dict[str, Any]) -> None:
    assert load_settings(_merged(changes)).model.name == "x"
