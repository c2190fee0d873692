"""A base that stays in its files gives the same weights, bit for bit, as one that is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config

from tests.support.results import CPU, adapted, disturbed
from tests.support.tiny import save_tiny_model
from tunesmith.export.merged_base import NotStreamableError, streamed
from tunesmith.export.merged_weights import from_memory, merged_tensors
from tunesmith.models.adapter import add_lora
from tunesmith.models.loader import load_model

OPTIONS: list[dict[str, Any]] = [
    {},
    {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
    {"use_dora": True},
    {"bias": "all"},
    {"modules_to_save": ["embed_tokens", "lm_head"]},
    {"trainable_token_indices": [5, 6]},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    size = {"hidden_size": 64, "intermediate_size": 128, "attention_bias": True}
    return save_tiny_model(tmp_path_factory.mktemp("base") / "model", **size)


def from_files(base: Path, adapter: Path, quantize: str = "none") -> dict[str, torch.Tensor]:
    model, read = streamed(str(base), None, adapter, quantize=quantize, dtype=torch.float32, device=CPU)
    return dict(merged_tensors(model.get_base_model(), read))


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_weights_from_files_are_those_of_a_loaded_model(
    tmp_path: Path, base: Path, quantize: str, options: dict[str, Any]
) -> None:
    if quantize == "int8" and "use_dora" in options:
        pytest.skip("PEFT cannot start DoRA from 8-bit weights on a CPU")
    model = adapted(base, quantize, **options)
    model.save_pretrained(tmp_path)
    expected = dict(merged_tensors(model.get_base_model(), from_memory))
    found = from_files(base, tmp_path, quantize)
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name].float(), expected[name].float())] == []


def test_what_is_no_weight_takes_no_memory(tmp_path: Path, base: Path) -> None:
    adapted(base).save_pretrained(tmp_path)
    model, _ = streamed(str(base), None, tmp_path, quantize="none", dtype=torch.float32, device=CPU)
    sizes = {
        name: p.untyped_storage().nbytes() for name, p in model.named_parameters() if "lora_" not in name
    }
    assert set(sizes.values()) == {4}
    assert all(p.untyped_storage().nbytes() > 4 for name, p in model.named_parameters() if "lora_" in name)


def test_a_base_in_many_files(tmp_path: Path, base: Path) -> None:
    adapted(base).save_pretrained(tmp_path / "adapter")
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    whole, parts = (from_files(folder, tmp_path / "adapter") for folder in (base, tmp_path / "sharded"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def _gpt2(folder: Path) -> Path:
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=384, n_positions=64, bos_token_id=None)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_a_base_that_holds_its_weights_transposed(tmp_path: Path) -> None:
    folder = _gpt2(tmp_path / "gpt2")
    model = load_model(str(folder), device=CPU, dtype=torch.float32)
    model = disturbed(add_lora(model, rank=4, alpha=8.0, dropout=0.0, targets="all-linear", seed=1))
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["fan_in_fan_out"]
    expected = dict(merged_tensors(model.get_base_model(), from_memory))
    found = from_files(folder, tmp_path / "adapter")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def _start(folder: Path, adapter: Path) -> tuple[Path, str]:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    return folder, "none"


def _names(folder: Path, _: Path) -> tuple[Path, str]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    state = {name.replace("mlp", "ffn"): tensor for name, tensor in model.state_dict().items()}
    other = folder.with_name("other")
    model.save_pretrained(other)
    from safetensors.torch import save_file

    state.pop("lm_head.weight")
    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    return other, "none"


def _quantised(folder: Path, _: Path) -> tuple[Path, str]:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    model.save_pretrained(folder.with_name("quantised"))
    return folder.with_name("quantised"), "none"


def _gone(folder: Path, _: Path) -> tuple[Path, str]:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    return folder, "none"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_start, "changes it as a whole"),
        (_names, "in another form"),
        (_quantised, "are quantised"),
        (_gone, "cannot be read"),
    ],
    ids=["pissa", "other names", "quantised files", "no files"],
)
def test_what_has_to_be_loaded(tmp_path: Path, change: Any, reason: str) -> None:
    folder = save_tiny_model(tmp_path / "base", hidden_size=64, intermediate_size=128)
    adapted(folder).save_pretrained(tmp_path / "adapter")
    base, quantize = change(folder, tmp_path / "adapter")
    with pytest.raises(NotStreamableError, match=reason):
        from_files(base, tmp_path / "adapter", quantize)


def test_more_tokens_than_the_base_has(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "base", vocab_size=380)
    model = load_model(str(folder), device=CPU, dtype=torch.float32)
    model.resize_token_embeddings(384, mean_resizing=False)
    model = add_lora(
        model, rank=4, alpha=8.0, dropout=0.0, targets="all-linear", seed=1, trainable_token_indices=[383]
    )
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(NotStreamableError, match="more tokens"):
        from_files(folder, tmp_path / "adapter")


def test_quantised_layers_of_another_kind(tmp_path: Path) -> None:
    folder = _gpt2(tmp_path / "gpt2")
    model = load_model(str(folder), device=CPU, dtype=torch.float32)
    add_lora(model, rank=4, alpha=8.0, dropout=0.0, targets="all-linear", seed=1).save_pretrained(
        tmp_path / "a"
    )
    with pytest.raises(NotStreamableError, match="of another kind"):
        from_files(folder, tmp_path / "a", "nf4")
