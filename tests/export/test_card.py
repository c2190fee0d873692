"""The front matter names a base model on the hub, and no folder of this machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import yaml

from tunesmith.export.card import Facts, model_card

FACTS = Facts(
    base_model="org/model", base_revision=None, adapter=False, quantize="nf4", sources=[], rows=1, steps=1, tokens=1,
    first_eval=None, last_eval=None, hyperparameters={}, versions={"tunesmith": "1"},
)  # fmt: skip


def test_a_hub_model_is_named_for_the_hub():
    card = model_card(FACTS)
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "org/model"
    assert "# A fine-tuned version of org/model" in card


def test_a_local_folder_is_named_by_its_last_part(tmp_path: Path):
    folder = tmp_path / "secret" / "my-model"
    folder.mkdir(parents=True)
    card = model_card(dataclasses.replace(FACTS, base_model=str(folder)))
    assert "base_model" not in yaml.safe_load(card.split("---")[1])
    assert "A fine-tuned version of `my-model`" in card
    assert "secret" not in card


def test_how_the_base_was_held():
    for quantize, words in (
        ("nf4", "trained on 4-bit (NF4) base weights"),
        ("int8", "trained on 8-bit base weights"),
    ):
        assert words in model_card(dataclasses.replace(FACTS, quantize=quantize))
    assert "base weights" not in model_card(dataclasses.replace(FACTS, quantize="none"))
