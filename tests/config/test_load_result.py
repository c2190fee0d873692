"""Results are loaded as their runs held them, with every end of an answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from tests.support.results import save_run
from tests.support.tiny import CHATML, save_tiny_model, tiny_llama, tiny_tokenizer
from tunesmith.config.find_result import find_result
from tunesmith.config.load_result import load_result, stop_of
from tunesmith.config.prompting import Prompter
from tunesmith.contracts.errors import UserError


@pytest.mark.parametrize(
    ("quantize", "kind"), [("none", "Linear"), ("nf4", "Linear4bit"), ("int8", "Linear8bitLt")]
)
def test_a_base_is_held_as_in_training(tmp_path: Path, quantize: str, kind: str) -> None:
    loaded = load_result(find_result(str(save_run(tmp_path / "run", quantize=quantize))))
    layer = loaded.model.get_base_model().model.layers[0].mlp.down_proj
    assert type(layer.base_layer).__name__ == kind
    assert loaded.adapter
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_every_end_counts() -> None:
    model = tiny_llama()
    model.generation_config = GenerationConfig(eos_token_id=[7, 9])
    # the tokenizer ends with <|im_end|>, 2; the template's turns with <|endoftext|>, 0
    tokenizer = tiny_tokenizer(CHATML.replace("<|im_end|>", "<|endoftext|>"))
    assert stop_of(model, tokenizer, Prompter(tokenizer)).ids == (7, 9, 2, 0)
    model.generation_config.eos_token_id = 7
    assert stop_of(model, tokenizer, Prompter(tokenizer)).ids == (7, 2, 0)
    model.generation_config.eos_token_id = None
    assert stop_of(model, tokenizer, Prompter(tokenizer)).ids == (2, 0)


def test_the_template_is_the_one_that_was_saved_with_the_result(tmp_path: Path) -> None:
    own = CHATML.replace("assistant\n", "assistant: ")
    loaded = load_result(find_result(str(save_run(tmp_path / "run", template=own))))
    assert loaded.prompter.text([{"role": "user", "content": "a"}]).endswith("<|im_start|>assistant: ")


def test_an_adapter_of_others_takes_the_tokenizer_of_its_base(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run")
    for file in [*(run / "adapter").glob("*token*"), run / "adapter" / "chat_template.jinja"]:
        file.unlink()
    assert len(load_result(find_result(str(run))).tokenizer) == len(tiny_tokenizer())


def test_switched_off_the_adapter_leaves_the_base(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", modules_to_save=["embed_tokens", "lm_head"])
    loaded, base = (load_result(find_result(str(place))) for place in (run, tmp_path / "run-base"))
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected, adapted = base.model(input_ids=ids).logits, loaded.model(input_ids=ids).logits
        with loaded.base_only():
            assert torch.equal(loaded.model(input_ids=ids).logits, expected)
    assert not torch.equal(adapted, expected)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_cannot_be_switched_off(tmp_path: Path, bias: str) -> None:
    run = save_run(tmp_path / "run", bias=bias, base={"attention_bias": True})
    with pytest.raises(UserError, match="changed the biases"), load_result(find_result(str(run))).base_only():
        pass
    plain = save_run(tmp_path / "plain", bias=bias)  # there is none to train
    with load_result(find_result(str(plain))).base_only():
        pass


def test_errors_speak_of_the_result_and_not_of_settings(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run")
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError) as caught:
        load_result(find_result(str(run)))
    assert str(caught.value).startswith("The weights of the adapter in ")
    folder = save_tiny_model(tmp_path / "broken")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError) as caught:
        load_result(find_result(str(folder)))
    assert "model.name" not in str(caught.value)
    assert str(folder) in str(caught.value)
