"""New special tokens through the whole way of a script: added, trained, saved, loaded, merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from tests.support.tiny import save_tiny_model, tiny_tokenizer
from tunesmith import FastLanguageModel, SFTTrainer, add_new_tokens

NEW = ["<call>", "</call>"]


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def is_special(tokenizer: Any, ids: list[int]) -> bool:
    """One token each, also inside a text, and left out of text for people."""
    found = tokenizer("a<call>b</call>")["input_ids"]
    return [found[1], found[3]] == ids and tokenizer.decode(ids, skip_special_tokens=True) == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare", [0, 8], ids=["resized", "in spare rows"])
@pytest.mark.parametrize("alone", [True, False], ids=["rows alone", "whole embeddings"])
def test_new_tokens_from_the_first_step_to_the_merged_model(
    tmp_path: Path, dtype: torch.dtype, tied: bool, spare: int, alone: bool
) -> None:
    rows = len(tiny_tokenizer()) + spare
    save_tiny_model(tmp_path / "base", tie_word_embeddings=tied, vocab_size=rows, dtype=dtype)
    loading = {"load_in_4bit": False, "dtype": dtype, "quiet": True, "max_seq_length": 64}
    model, tokenizer = FastLanguageModel.from_pretrained(str(tmp_path / "base"), **loading)
    old = model.get_input_embeddings().weight[: len(tokenizer)].mean(dim=0, dtype=torch.float32).to(dtype)
    ids = add_new_tokens(model, tokenizer, NEW)
    start = model.get_input_embeddings().weight.detach().clone()
    assert torch.equal(start[ids], old.expand(2, -1))
    trained = {"trainable_token_indices": ids} if alone else {"modules_to_save": ["embed_tokens", "lm_head"]}
    model = FastLanguageModel.get_peft_model(model, r=4, **trained)
    data = Dataset.from_dict({"text": ["<call> four apples</call>", "How many apples are left?"] * 4})
    args = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=2, learning_rate=1e-2, save_strategy="no"
    )
    SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=data, args=args).train()
    moved = (model.get_base_model().get_input_embeddings().weight.detach() != start).any(dim=1)
    assert moved[ids].all()
    assert (moved.sum() == 2) == alone

    model.save_pretrained_merged(tmp_path / "adapter", tokenizer, "lora")
    model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    again, tokens = FastLanguageModel.from_pretrained(str(tmp_path / "adapter"), **loading)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    text = tokens("<call> how many apples</call>", return_tensors="pt")["input_ids"]
    assert torch.equal(logits(again, text), logits(model, text))
    torch.testing.assert_close(
        logits(merged, text), logits(model, text).float(), rtol=0, atol=0.02
    )  # bfloat16
    for each in (tokenizer, tokens, AutoTokenizer.from_pretrained(tmp_path / "merged")):
        assert is_special(each, ids)
    # and it trains on from the values that were saved, not from rounded ones
    kept = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in again.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, kept[name])
