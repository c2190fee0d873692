"""Base and adapter as one model: what plain transformers loads computes what base and adapter did."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

from tests.support.results import adapted, disturbed
from tests.support.tiny import save_tiny_model, tiny_llama
from tunesmith.contracts.errors import StorageError, UserError
from tunesmith.export import merged, merged_files
from tunesmith.export.merged import save_merged

IDS = torch.arange(3, 40)[None]


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
    folder = tmp_path / "merged"
    save_merged(adapted(tiny_model_dir), folder, torch.float32)
    before = (folder / "model.safetensors").read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(merged_files, "save_file", full)
    with pytest.raises(StorageError, match="cannot be written: No space left"):
        save_merged(adapted(tiny_model_dir), folder, torch.float32)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_shards_hold_no_more_than_they_may_and_replace_older_files(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    model, folder = adapted(tiny_model_dir), tmp_path / "merged"
    expected = logits(model)
    save_merged(model, folder, torch.float32)
    save_merged(model, folder, torch.float32, "30KB")
    assert not (folder / "model.safetensors").exists()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert {path.name for path in shards} == set(index["weight_map"].values())
    sizes = [sum(tensor.nbytes for tensor in load_file(path).values()) for path in shards]
    assert sum(sizes) == index["metadata"]["total_size"]
    # the embeddings alone are larger, and have a file of their own
    assert sorted(sizes)[-1] == 384 * 32 * 4
    assert all(size <= 30_000 for size in sorted(sizes)[:-1])
    merged = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    save_merged(model, folder, torch.float32)
    assert not list(folder.glob("model*-*.safetensors")) + list(folder.glob("*.index.json"))


def test_memory_holds_one_shard(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the tensors made for the files no more are alive at a time than a shard, a layer and the embeddings."""
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = [0]
    plain = merged.on_host

    def watched(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        made = plain(name, tensor, dtype)
        alive.add(made)
        most[0] = max(most[0], sum(each.nbytes for each in alive))
        return made

    monkeypatch.setattr(merged, "on_host", watched)
    save_merged(adapted(tiny_model_dir), tmp_path / "merged", torch.bfloat16, "8KB")
    total = sum(
        tensor.nbytes
        for path in (tmp_path / "merged").glob("*.safetensors")
        for tensor in load_file(path).values()
    )
    layer = total - 384 * 32 * 2
    embeddings = 384 * 32 * 2
    assert most[0] <= 8_000 + layer / 2 + 2 * embeddings
    assert most[0] < total + embeddings


def test_experts_lie_in_the_files_as_their_family_has_them(tmp_path: Path) -> None:
    model = disturbed(
        get_peft_model(_experts(), LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"]))
    )
    save_merged(model, tmp_path / "merged", torch.float32)
    _experts().save_pretrained(tmp_path / "plain")
    names = [set(load_file(tmp_path / folder / "model.safetensors")) for folder in ("merged", "plain")]
    assert names[0] == names[1]
    assert any("experts.0.gate_proj" in name for name in names[0])


def test_a_value_that_float16_cannot_hold(tmp_path: Path, tiny_model_dir: Path) -> None:
    model = adapted(tiny_model_dir)
    with torch.no_grad():
        model.get_base_model().model.norm.weight[3] = 1e6
    with pytest.raises(UserError, match=r"model.norm.weight has values that float16 cannot hold"):
        save_merged(model, tmp_path / "merged", torch.float16)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("size", "count"), [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("1.5KiB", 1536), ("2000", 2000)]
)
def test_sizes(size: str, count: int) -> None:
    assert merged_files.bytes_of(size) == count


@pytest.mark.parametrize("size", ["", "big", "5XB", "-1GB", "0"])
def test_what_is_no_size(size: str) -> None:
    with pytest.raises(UserError, match="is no size of a file"):
        merged_files.bytes_of(size)
