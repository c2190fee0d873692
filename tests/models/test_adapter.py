"""What is trained: targets, types, adapters that fit and adapters that do not, frozen parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model

from tests.support.tiny import tiny_llama
from tunesmith.contracts.errors import UserError
from tunesmith.models.adapter import add_lora, load_lora, train_all


def lora(model, **changes):
    values = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": "all-linear", "seed": 1}
    return add_lora(model, **(values | changes))


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def saved(folder: Path, config: object = None, **changes) -> Path:
    config = config or LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(tiny_llama(**changes), config).save_pretrained(folder)
    return folder


def test_every_linear_layer_but_the_head_gets_an_adapter() -> None:
    model = lora(tiny_llama())
    assert len(trained(model)) == 2 * 7 * 2  # layers, projections, A and B
    assert all(".lora_" in name and "lm_head" not in name for name in trained(model))


def test_a_fresh_adapter_changes_nothing() -> None:
    ids = torch.arange(6)[None]
    base = tiny_llama()
    expected = base(input_ids=ids).logits
    torch.testing.assert_close(lora(base)(input_ids=ids).logits, expected, rtol=0, atol=0)


def test_the_seed_decides_the_first_values() -> None:
    def first(seed: int) -> torch.Tensor:
        return next(iter(trained(lora(tiny_llama(), seed=seed)).values()))

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_is_float32_on_half_precision_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    model = lora(tiny_llama(dtype=dtype))
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    assert {p.dtype for name, p in model.named_parameters() if "lora" not in name} == {dtype}
    again = load_lora(tiny_llama(dtype=dtype), str(saved(tmp_path / "a")))
    assert {p.dtype for p in trained(again).values()} == {torch.float32}


def test_named_targets_and_nothing_else() -> None:
    model = lora(tiny_llama(), targets=["q_proj", "layers.1.mlp.up_proj"])
    assert {name.split(".lora_")[0].split("layers.")[1] for name in trained(model)} == {
        "0.self_attn.q_proj", "1.self_attn.q_proj", "1.mlp.up_proj",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("target", "hint"),
    [
        ("qproj", "Did you mean 'q_proj'?"),
        ("zzz", "There are: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj."),
        ("proj", None),
    ],
)
def test_a_target_that_names_no_linear_layer(target: str, hint: str | None) -> None:
    with pytest.raises(UserError) as caught:
        lora(tiny_llama(), targets=["q_proj", target])
    assert f"is called {target!r}" in caught.value.message
    assert hint is None or caught.value.hint == hint


def test_embeddings_are_no_target() -> None:
    with pytest.raises(
        UserError, match="cannot be put on embed_tokens, which trains whole or not at all"
    ) as caught:
        lora(tiny_llama(), targets=["q_proj", "lm_head", "embed_tokens"])
    assert caught.value.hint == "Name embed_tokens and lm_head in modules_to_save in place of here."


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_no_target(tied: bool) -> None:
    with pytest.raises(UserError, match="language-model head"):
        lora(tiny_llama(tie_word_embeddings=tied), targets=["lm_head"])


# ---------------------------------------------------------------- going on with an adapter


def test_an_adapter_is_loaded_as_it_was_saved_and_trains(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    first = get_peft_model(tiny_llama(), config)
    first.save_pretrained(tmp_path)
    second = load_lora(tiny_llama(), str(tmp_path))
    assert trained(second).keys() == trained(first).keys()
    for name, parameter in trained(second).items():
        assert torch.equal(parameter, trained(first)[name])


def test_an_adapter_in_the_home_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    saved(tmp_path / "mine")
    assert trained(load_lora(tiny_llama(), "~/mine"))


def refusal(folder: Path, **changes) -> str:
    with pytest.raises(UserError) as caught:
        load_lora(tiny_llama(**changes), str(folder))
    assert caught.value.message.startswith("adapter.path: ")
    assert "\n" not in caught.value.message
    return caught.value.message


def test_folders_without_an_adapter(tmp_path: Path) -> None:
    assert "holds no adapter_config.json" in refusal(tmp_path / "nothing")
    folder = saved(tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "holds no adapter_model.safetensors" in refusal(folder)


@pytest.mark.parametrize(
    ("made_for", "reason"),
    [
        ({"num_hidden_layers": 4}, "the model has no place for base_model.model.model.layers.2"),
        ({"num_hidden_layers": 1}, "it lacks base_model.model.model.layers.1"),
        ({"hidden_size": 64}, "size mismatch"),
    ],
)
def test_an_adapter_of_another_model_is_refused(
    tmp_path: Path, made_for: dict[str, int], reason: str
) -> None:
    assert reason in refusal(saved(tmp_path, **made_for))


def test_another_kind_of_adapter_is_refused(tmp_path: Path) -> None:
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    assert "only LoRA can be continued" in refusal(saved(tmp_path, config))


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("adapter_model.safetensors", "garbage" * 9, "are damaged"),
        ("adapter_config.json", "{", "is not an adapter's"),
        ("adapter_config.json", "{}", "is not an adapter's"),
    ],
)
def test_damaged_adapters(tmp_path: Path, file: str, content: str, reason: str) -> None:
    (saved(tmp_path) / file).write_text(content)
    assert reason in refusal(tmp_path)


def test_target_modules_that_the_model_lacks(tmp_path: Path) -> None:
    file = saved(tmp_path) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": ["zork"]}))
    assert "zork" in refusal(tmp_path)


# ---------------------------------------------------------------- full fine-tuning


def test_everything_trains_in_float32() -> None:
    model = train_all(tiny_llama(dtype=torch.bfloat16).requires_grad_(False), [])
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.float32, True)}
    assert model.lm_head.weight is model.model.embed_tokens.weight, "tied weights stay tied"


def test_frozen_parts_stay_as_they_are() -> None:
    model = train_all(
        tiny_llama(dtype=torch.bfloat16), ["model.embed_tokens.*", "model.layers.[0-1].mlp.*"], torch.bfloat16
    )
    for name, parameter in model.named_parameters():
        frozen = "embed_tokens" in name or ".mlp." in name
        assert parameter.requires_grad is not frozen, name
        assert parameter.dtype == (torch.bfloat16 if frozen else torch.float32), name


@pytest.mark.parametrize(
    ("patterns", "sentence"),
    [(["model.layer.*"], "'model.layer.*' matches no parameter"), (["*"], "leaves no parameter to train")],
)
def test_patterns_that_make_no_sense(patterns: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        train_all(tiny_llama(), patterns)
    assert sentence in caught.value.message
