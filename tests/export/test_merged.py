"""Base and adapter as one model: what plain transformers loads computes what base and adapter did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support.tiny import save_tiny_model
from tunesmith.contracts.errors import UserError
from tunesmith.export.merged import base_weight, save_merged
from tunesmith.models.adapter import add_lora
from tunesmith.models.loader import load_model

CPU = torch.device("cpu")
IDS = torch.arange(3, 40)[None]


def adapted(folder: Path, quantize: str = "none", **options: Any) -> Any:
    """A model whose adapter has been trained, as far as its numbers go."""
    model = load_model(str(folder), device=CPU, dtype=torch.float32, quantize=quantize)
    values = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": "all-linear", "seed": 1}
    model = add_lora(model, **(values | options)).eval()
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": [5, 6]},
    ],
    ids=str,
)
def test_the_merged_model_computes_the_same(tmp_path: Path, quantize: str, options: dict[str, Any]) -> None:
    if quantize == "int8" and "use_dora" in options:
        pytest.skip("PEFT cannot start DoRA from 8-bit weights on a CPU")
    size = {"hidden_size": 64, "intermediate_size": 128, "attention_bias": True}
    model = adapted(save_tiny_model(tmp_path / "base", **size), quantize, **options)
    expected = logits(model)
    save_merged(model, tmp_path / "merged", torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.float32
    # the layers of an 8-bit base round their inputs as well, which no merged weight can
    bound = 0.02 * expected.abs().max().item() if quantize == "int8" else 1e-5
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=bound)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)  # it is still whole, adapter and all


def test_sixteen_bits_are_rounded_once(tmp_path: Path, tiny_model_dir: Path) -> None:
    model = adapted(tiny_model_dir)
    save_merged(model, tmp_path / "merged", torch.bfloat16)
    saved = load_file(tmp_path / "merged" / "model.safetensors")
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    exact = layer.base_layer.weight + layer.get_delta_weight("default")
    assert torch.equal(saved["model.layers.1.mlp.down_proj.weight"], exact.to(torch.bfloat16))
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    original = load_file(tiny_model_dir / "model.safetensors")
    assert saved.keys() == original.keys()


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_stays_tied_unless_it_was_trained_apart(tmp_path: Path, tied: bool) -> None:
    model = adapted(save_tiny_model(tmp_path / "base", tie_word_embeddings=tied))
    save_merged(model, tmp_path / "merged", torch.float32)
    assert ("lm_head.weight" in load_file(tmp_path / "merged" / "model.safetensors")) == (not tied)
    base = model.get_base_model()
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight + 1.0)
    save_merged(model, tmp_path / "apart", torch.float32)
    apart = AutoModelForCausalLM.from_pretrained(tmp_path / "apart")
    torch.testing.assert_close(logits(apart), logits(model), rtol=0, atol=1e-5)


def test_an_adapter_that_is_switched_off_is_left_out(tmp_path: Path, tiny_model_dir: Path) -> None:
    model = adapted(tiny_model_dir)
    with model.disable_adapter():
        save_merged(model, tmp_path / "merged", torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(plain))


def test_a_bias_that_the_base_has_no_place_for(tmp_path: Path, tiny_model_dir: Path) -> None:
    model = adapted(tiny_model_dir, lora_bias=True)
    with pytest.raises(UserError, match="has a bias, and the base has none"):
        save_merged(model, tmp_path / "merged", torch.float32)


def test_weights_in_four_and_eight_bits_as_their_layers_use_them(wide_model_dir: Path) -> None:
    exact = (
        load_model(str(wide_model_dir), device=CPU, dtype=torch.float32).model.layers[0].mlp.up_proj.weight
    )
    eye = torch.eye(64)
    for quantize, bound in (
        ("nf4", 1e-6),
        ("int8", 2e-3),
    ):  # int8 layers round `eye` and their sums to float16
        model = load_model(str(wide_model_dir), device=CPU, dtype=torch.float32, quantize=quantize)
        layer = model.model.layers[0].mlp.up_proj
        for _ in range(2):  # the first call of an 8-bit layer moves its scales
            weight = base_weight(layer)
            torch.testing.assert_close(layer(eye).T, weight, rtol=0, atol=bound)
            assert 0 < (weight - exact).abs().max() < 0.02
