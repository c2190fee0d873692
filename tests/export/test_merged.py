"""Base and adapter as one model: what plain transformers loads computes what base and adapter did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaForCausalLM

from tests.support.tiny import save_tiny_model, tiny_llama
from tunesmith.contracts.errors import StorageError, UserError
from tunesmith.export.merged import save_merged
from tunesmith.models.adapter import add_lora
from tunesmith.models.loader import load_model

CPU = torch.device("cpu")
IDS = torch.arange(3, 40)[None]


def disturbed(model: Any) -> Any:
    """The model as if it had been trained, as far as its numbers go."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def adapted(folder: Path, quantize: str = "none", **options: Any) -> Any:
    """A model with an adapter that has been trained."""
    model = load_model(str(folder), device=CPU, dtype=torch.float32, quantize=quantize)
    values = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": "all-linear", "seed": 1}
    return disturbed(add_lora(model, **(values | options)))


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


def _gpt2() -> Any:
    return AutoModelForCausalLM.from_config(
        GPT2Config(
            n_embd=32, n_layer=2, n_head=4, vocab_size=384, n_positions=64, bos_token_id=None, eos_token_id=2
        )
    )


def _experts() -> Any:
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=384, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, head_dim=8,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


LAYERS = {
    # a square weight: laid out the wrong way round it would be added without a word
    "transposed": (_gpt2, {"target_modules": ["attn.c_proj"]}),
    "transposed, all and DoRA": (_gpt2, {"target_modules": "all-linear", "use_dora": True}),
    "embeddings": (tiny_llama, {"target_modules": ["embed_tokens", "q_proj"], "init_lora_weights": False}),
    "experts in one parameter": (_experts, {"target_modules": "all-linear"}),
}


@pytest.mark.filterwarnings("ignore")  # PEFT tells what it sets for each of these
@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_hold_their_weights_in_other_ways(tmp_path: Path, name: str) -> None:
    make, options = LAYERS[name]
    model = disturbed(get_peft_model(make(), LoraConfig(r=4, task_type="CAUSAL_LM", **options)))
    expected = logits(model)
    save_merged(model, tmp_path, torch.float32)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected, rtol=0, atol=1e-5
    )
    with model.disable_adapter():
        assert (logits(model) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("dora", [False, True])
def test_two_adapters_at_once(tmp_path: Path, dora: bool) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=dora)
    model = get_peft_model(tiny_llama(), config)
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    expected = logits(disturbed(model))
    save_merged(model, tmp_path, torch.float32)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(
    "options",
    [{"modules_to_save": ["embed_tokens", "lm_head"]}, {"trainable_token_indices": [5, 6]}],
    ids=lambda options: next(iter(options)),
)
def test_what_trained_beside_an_adapter_is_off_with_it(
    tmp_path: Path, tiny_model_dir: Path, options: dict[str, Any]
) -> None:
    model = adapted(tiny_model_dir, **options)
    with model.disable_adapter():
        save_merged(model, tmp_path / "merged", torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(plain))


def test_an_adapter_of_a_kind_that_has_no_merged_form(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["embed_tokens"], use_dora=True)
    with pytest.raises(UserError, match=r"embed_tokens carries a DoraEmbeddingVariant, which has no exact"):
        save_merged(get_peft_model(tiny_llama(), config), tmp_path, torch.float32)
    assert not any(tmp_path.iterdir())


def test_a_folder_that_holds_an_adapter(tmp_path: Path, tiny_model_dir: Path) -> None:
    model = adapted(tiny_model_dir)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds an adapter"):
        save_merged(model, tmp_path, torch.float32)


def test_a_disk_that_is_full(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    with pytest.raises(StorageError, match="cannot be written: No space left"):
        save_merged(adapted(tiny_model_dir), tmp_path, torch.float32)
