"""Options of adapters in a run file: each reaches the model, trains, and the result loads in plain PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

from tests.support.runs import build, run_settings, train
from tests.support.tiny import save_tiny_model, tiny_tokenizer
from tunesmith.config import summary
from tunesmith.config.load import load_settings
from tunesmith.contracts.errors import ConfigError, UserError


def trained(run: Any) -> dict[str, torch.Tensor]:
    return run.backend.trained_parameters()


def names(run: Any) -> set[str]:
    return {name.removeprefix("base_model.model.model.layers.").split(".lora_")[0] for name in trained(run)}


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [
        ({"targets": r".*\.1\..*(q|up)_proj"}, {"1.self_attn.q_proj", "1.mlp.up_proj"}),
        ({"targets": ["q_proj"], "layers_to_transform": [0]}, {"0.self_attn.q_proj"}),
        ({"targets": ["q_proj"], "last_layers": 1}, {"1.self_attn.q_proj"}),
        ({"targets": ["q_proj"], "last_layers": 9}, {"0.self_attn.q_proj", "1.self_attn.q_proj"}),
    ],
    ids=["pattern", "numbers", "last", "more than there are"],
)
def test_which_layers(
    tiny_model_dir: Path, tmp_path: Path, adapter: dict[str, Any], expected: set[str]
) -> None:
    run, _ = build(run_settings(tiny_model_dir, tmp_path, adapter=adapter))
    assert names(run) == expected


def test_options_reach_peft(tiny_model_dir: Path, tmp_path: Path) -> None:
    adapter = {
        "use_rslora": True, "use_dora": True, "bias": "lora_only", "init_lora_weights": "gaussian",
        "targets": ["q_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3.0},
        "modules_to_save": ["embed_tokens"],
    }  # fmt: skip
    run, _ = build(run_settings(tiny_model_dir, tmp_path, adapter=adapter))
    config = run.causal.model.peft_config["default"]
    for name in ("use_rslora", "use_dora", "bias", "init_lora_weights", "rank_pattern", "alpha_pattern"):
        assert getattr(config, name) == adapter[name]
    assert any("embed_tokens" in name for name in trained(run))


@pytest.mark.parametrize(
    ("adapter", "quantize"),
    [
        ({"use_dora": True}, "none"),
        ({"init_lora_weights": "pissa"}, "none"),
        ({"init_lora_weights": "loftq"}, "nf4"),
        ({"rank": 4}, "int8"),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, "none"),
        ({"new_tokens": ["<call>"], "modules_to_save": ["embed_tokens", "lm_head"]}, "none"),
        ({"new_tokens": ["<call>"]}, "none"),
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [True, False])
def test_the_result_is_what_was_trained(
    tmp_path: Path, adapter: dict[str, Any], quantize: str, tied: bool
) -> None:
    size = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "vocab_size": len(tiny_tokenizer()),
        "tie_word_embeddings": tied,
    }
    base = save_tiny_model(tmp_path / "base", **size)
    settings = run_settings(
        base, tmp_path, rows=24, adapter=adapter, model={"quantize": quantize}, train={"steps": 3}
    )
    before, _ = build(settings)
    start = {name: p.clone() for name, p in trained(before).items()}
    result = train(settings)
    assert result.last_eval is not None
    plain = AutoPeftModelForCausalLM.from_pretrained(result.result)
    tokenizer = AutoTokenizer.from_pretrained(result.result)
    assert all(
        len(tokenizer(text, add_special_tokens=False)["input_ids"]) == 1
        for text in adapter.get("new_tokens", ())
    )
    kept = {name: p for name, p in plain.state_dict().items() if name in start}
    assert kept.keys() == start.keys()
    assert sum(not torch.equal(kept[name], p) for name, p in start.items()) >= len(start) // 2
    assert torch.isfinite(plain(torch.tensor([[3, len(tokenizer) - 1]])).logits).all()


@pytest.mark.parametrize(
    ("tied", "whole", "rows"),
    [
        (True, "norm", {"embed_tokens"}),
        (True, "lm_head", set()),
        (False, "norm", {"embed_tokens", "lm_head"}),
        (False, "lm_head", {"embed_tokens"}),
    ],
)
def test_rows_of_new_tokens_train_beside_modules_that_are_not_theirs(
    tmp_path: Path, tied: bool, whole: str, rows: set[str]
) -> None:
    base = save_tiny_model(tmp_path / "base", tie_word_embeddings=tied)
    adapter = {"new_tokens": ["<call>"], "modules_to_save": [whole]}
    run, _ = build(run_settings(base, tmp_path, adapter=adapter))
    found = [name for name in trained(run) if "trainable_tokens_delta" in name]
    assert {name.split(".token_adapter")[0].rsplit(".", 1)[-1] for name in found} == rows


def test_the_plan_says_what_is_asked_for_beyond_the_usual(tiny_model_dir: Path, tmp_path: Path) -> None:
    def said(**adapter: Any) -> str:
        run, _ = build(run_settings(tiny_model_dir, tmp_path, adapter=adapter))
        return summary._model_line(run).split("; ")[1].rsplit(", ", 1)[0]

    assert said() == "LoRA rank 4"
    assert said(use_dora=True, use_rslora=True) == "LoRA rank 4 with DoRA, rsLoRA"
    options = {"bias": "all", "modules_to_save": ["embed_tokens"], "new_tokens": ["<call>"]}
    assert said(init_lora_weights="pissa", **options) == (
        "LoRA rank 4 with start pissa, biases, embed_tokens, 1 new token"
    )


def test_rates_of_their_own(tiny_model_dir: Path, tmp_path: Path) -> None:
    adapter = {"loraplus_lr_ratio": 8.0, "embedding_learning_rate": 1e-5, "modules_to_save": ["embed_tokens"]}
    run, _ = build(run_settings(tiny_model_dir, tmp_path, adapter=adapter))
    run.trainer.schedule.apply(run.backend.optimizer, 0)
    called = {parameter: name for name, parameter in run.causal.model.named_parameters()}
    rates = {called[p]: group["lr"] for group in run.backend.optimizer.param_groups for p in group["params"]}
    for part, ratio in (("lora_A", 1.0), ("lora_B", 8.0), ("embed_tokens", 1e-5 / 5e-3)):
        found = [rate for name, rate in rates.items() if part in name]
        assert found == pytest.approx([5e-3 * ratio] * len(found), rel=1e-6)


def test_new_tokens_are_tokens_of_the_data(tiny_model_dir: Path, tmp_path: Path) -> None:
    settings = run_settings(tiny_model_dir, tmp_path)
    plain, _ = build(settings)
    settings["adapter"]["new_tokens"] = ["clips"]
    run, _ = build(settings)
    (new,) = run.tokenizer("clips", add_special_tokens=False)["input_ids"]
    assert new == len(run.tokenizer) - 1
    places = [run.data.corpus.locate(number) for number in range(len(run.data.corpus))]
    ids = [token for source, at in places for token in source.ids(at)]
    assert new in ids
    assert plain.data.fingerprint != run.data.fingerprint


def test_a_run_goes_on_with_the_same_options_only(tiny_model_dir: Path, tmp_path: Path) -> None:
    settings = run_settings(tiny_model_dir, tmp_path, adapter={"use_rslora": True})
    train(settings)
    settings["adapter"]["use_rslora"] = False
    settings["train"]["steps"] = 8
    with pytest.raises(UserError, match=r"adapter\.use_rslora"):
        train(settings)


def test_wrong_types_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings({
            "model": {"name": "x"}, "data": {"train": [{"path": "a"}]},
            "adapter": {"rank_pattern": {"q_proj": "four"}, "last_layers": 0, "init_lora_weights": "eva",
                        "bias": True},
        })  # fmt: skip
    found = {problem.where.removeprefix("adapter.").split(".")[0] for problem in caught.value.problems}
    assert found == {"rank_pattern", "last_layers", "init_lora_weights", "bias"}, json.dumps(
        str(caught.value)
    )
