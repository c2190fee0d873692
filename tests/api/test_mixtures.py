"""Mixtures of experts through the two doors: what gets no adapter is said, and an adapter is known again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import tunesmith
from tests.support.tiny import tiny_tokenizer
from tunesmith import FastLanguageModel, UserError

_SMALL = {
    "vocab_size": 384, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


def saved(folder: Path, family: str) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **_SMALL)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    return FastLanguageModel.from_pretrained(str(folder), load_in_4bit=False, max_seq_length=64)[0]


def test_a_script_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = FastLanguageModel.get_peft_model(load(saved(tmp_path / "base", "phimoe")), r=4)
    said = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert ["routers", "no adapter: they choose among experts, and stay as they were trained"] in said
    assert [
        "experts",
        "no adapter: one tensor holds all of a layer, and adapters are put on linear layers",
    ] in said
    model.save_pretrained(tmp_path / "adapter")
    again = FastLanguageModel.get_peft_model(load(tmp_path / "adapter"), r=4)
    assert (
        "routers" not in capsys.readouterr().out
    )  # of an adapter that was there nobody asked for all layers
    ids = torch.arange(3, 20)[None]
    assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)


def test_an_adapter_on_experts_is_known_again(tmp_path: Path) -> None:
    targets = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    model = load(saved(tmp_path / "base", "qwen3_moe"))
    FastLanguageModel.get_peft_model(model, r=4, target_modules=targets).save_pretrained(tmp_path / "adapter")
    again = load(tmp_path / "adapter")
    FastLanguageModel.get_peft_model(again, r=4, target_modules=targets)
    with pytest.raises(UserError, match="carries an adapter with target_modules"):
        FastLanguageModel.get_peft_model(again, r=4, target_modules=["q_proj", *targets[2:]])


def test_a_run_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.dumps({"text": f"How many apples are left? {number}"}) for number in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    run = {
        "model": {"name": str(saved(tmp_path / "base", "phimoe"))},
        "data": {"train": [{"path": str(tmp_path / "rows.jsonl")}]},
        "train": {"steps": 1, "sequence_length": 64, "global_batch": 2},
        "output": {"dir": str(tmp_path / "run")},
    }
    assert tunesmith.train(run).steps == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "layers routers: no adapter, they choose among experts" in said
