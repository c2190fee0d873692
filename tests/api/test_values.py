"""Values of arguments: refused in one sentence, before anything is loaded or changed."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny import tiny_llama
from tunesmith import FastLanguageModel, UserError
from tunesmith.api.facts import Facts, remember
from tunesmith.api.values import names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_name": None}, "model_name is None, and has to be a hub id, a folder or a file"),
        ({"model_name": ""}, "model_name is ''"),
        ({"model_name": "here/is/none.gguf"}, "there is no file here/is/none.gguf"),
        ({"max_seq_length": 0}, "max_seq_length is 0, and has to be a whole number from 1 up"),
        ({"max_seq_length": "2048"}, "max_seq_length is '2048'"),
        ({"max_seq_length": None}, "max_seq_length is None"),
        ({"max_seq_length": True}, "max_seq_length is True"),
        ({"rope_scaling": 2.0}, "rope_scaling is 2.0, and has to be a dict"),
        ({"rope_scaling": {"factor": 2.0}}, r"does not say how.\nAdd .rope_type., one of .*linear.*yarn"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling: yarn without factor.\nIt needs factor"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": "2"}},
            "rope_scaling: factor is '2': Input should be a valid number",
        ),
        (
            {"rope_scaling": {"rope_type": "linear", "faktor": 2.0}},
            "there is no parameter 'faktor'.\nlinear has factor",
        ),
        ({"rope_scaling": {"type": "liner"}}, r"no rope_type 'liner'.\nDid you mean 'linear'"),
        ({"revision": "main"}, "revision='main' is for models on the hub"),
    ],
    ids=str,
)
def test_what_is_not_loaded(
    tiny_model_dir: Path, monkeypatch, arguments: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("tunesmith.api.loading.load_model", None)
    with pytest.raises(UserError, match=message):
        FastLanguageModel.from_pretrained(**({"model_name": str(tiny_model_dir)} | arguments))


def test_a_path_is_a_name(tiny_model_dir: Path, capsys) -> None:
    model, _ = FastLanguageModel.from_pretrained(tiny_model_dir, load_in_4bit=False)
    FastLanguageModel.get_peft_model(model)
    assert capsys.readouterr().out.splitlines()[-4] == f"tunesmith: {tiny_model_dir}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 0}, "r is 0, and has to be a whole number from 1 up"),
        ({"r": 16.0}, "r is 16.0"),
        ({"r": "16"}, "r is '16'"),
        ({"lora_alpha": 0}, "lora_alpha is 0, and has to be a number above 0"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x'"),
        ({"lora_dropout": -0.1}, "lora_dropout is -0.1, and has to be a number from 0 up and below 1"),
        ({"lora_dropout": 1}, "lora_dropout is 1"),
        ({"target_modules": []}, r"target_modules is \[\]"),
        ({"target_modules": [1]}, r"target_modules is \[1\]"),
        ({"bias": True}, "bias is True, and has to be 'none', 'all' or 'lora_only'"),
        ({"layers_to_transform": ["a"]}, "layers_to_transform is .*, and has to be None, a number"),
        ({"random_state": None}, "random_state is None"),
        ({"max_seq_length": -1}, "max_seq_length is -1, and has to be None or a whole number"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern is .*, and has to be a dict of which each value is a whole"),
        ({"rank_pattern": 3}, "rank_pattern is 3"),
        ({"alpha_pattern": {"q_proj": -1}}, "alpha_pattern is"),
        ({"trainable_token_indices": ["<a>"]}, "trainable_token_indices is"),
        ({"trainable_token_indices": [384]}, r"no token 384.\nThe embeddings have rows 0 to 383"),
        ({"rank_pattern": {"q_prj": 4}}, r"^rank_pattern: no layer .* called 'q_prj'.\nDid you mean 'q_proj'"),
        ({"exclude_modules": ["q_prj"]}, r"^exclude_modules: no layer .* 'q_prj'.\nDid you mean 'q_proj'"),
        ({"modules_to_save": "lmhead"}, r"modules_to_save: no module .* 'lmhead'.\nDid you mean 'lm_head'"),
    ],
    ids=str,
)  # fmt: skip
def test_what_an_adapter_is_not_made_of(arguments: dict[str, Any], message: str) -> None:
    model = tiny_llama()
    model.max_seq_length = 64
    remember(model, Facts("tiny", full=False, checkpointing=False, quiet=True))
    with pytest.raises(UserError, match=message):
        FastLanguageModel.get_peft_model(model, **arguments)
    assert not any("lora_" in name for name, _ in model.named_parameters())


def test_one_name_needs_no_list(tiny_model_dir: Path) -> None:
    assert (names("a"), names(["a", "b"]), names(None)) == (("a",), ("a", "b"), ())
    model, _ = FastLanguageModel.from_pretrained(str(tiny_model_dir), load_in_4bit=False, quiet=True)
    model = FastLanguageModel.get_peft_model(model, modules_to_save="embed_tokens")
    assert model.get_base_model().get_input_embeddings().weight.requires_grad


def test_rows_longer_than_the_model_was_made_for(tiny_model_dir: Path, capsys) -> None:
    model, _ = FastLanguageModel.from_pretrained(str(tiny_model_dir), max_seq_length=64, load_in_4bit=False)
    assert capsys.readouterr().out == ""
    model = FastLanguageModel.get_peft_model(model, max_seq_length=513)
    assert "max_seq_length is 513, and the model was made for 512 positions" in capsys.readouterr().out
    stretched, _ = FastLanguageModel.from_pretrained(
        str(tiny_model_dir), load_in_4bit=False, rope_scaling={"rope_type": "dynamic", "factor": 4.0}
    )
    FastLanguageModel.get_peft_model(stretched, max_seq_length=1024)
    assert "positions" not in capsys.readouterr().out


def test_a_sentence_is_said_once(tmp_path: Path) -> None:
    """Errors of the layers below are put in the words of arguments; nobody needs to read both."""
    with pytest.raises(UserError, match="model_name: there is no folder") as caught:
        FastLanguageModel.from_pretrained(str(tmp_path / "none"))
    assert "".join(traceback.format_exception(caught.value)).count("Traceback") == 1
