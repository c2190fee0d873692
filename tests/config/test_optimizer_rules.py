"""What a run file may not ask of an optimizer, and the sentence that says so."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith.config.load import load_settings
from tunesmith.contracts.errors import ConfigError


def problems(train: dict[str, Any], adapter: str = "lora") -> str:
    """All that is wrong with these settings, as one text."""
    plain = {
        "model": {"name": "m"},
        "adapter": {"kind": adapter},
        "data": {"train": [{"path": "rows.jsonl"}]},
        "train": train,
    }
    try:
        load_settings(plain)
    except ConfigError as error:
        return str(error)
    return ""


FREE = {"optimizer": "schedule_free_adamw", "scheduler": "constant"}


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"optimizer": "muon"}, "adapter.kind: none"),
        (FREE | {"scheduler": "cosine"}, "write scheduler: constant"),
        (FREE | {"betas": [0.0, 0.99]}, "set the first to 0.9"),
        ({"groups": [{"match": "norm"}]}, "train.groups.0 changes nothing"),
        ({"groups": [{"match": "(norm", "learning_rate": 1e-3}]}, "a regular expression (missing )"),
        ({"groups": [{"match": "", "learning_rate": 1e-3}]}, "train.groups.0.match"),
        ({"groups": [{"match": "norm", "learning_rate": 0.0}]}, "a number above 0"),
        ({"groups": [{"match": "norm", "lr": 1e-3}]}, "unknown setting train.groups.0.lr"),
        ({"optimizer": "adamw_torch_4bits"}, "did you mean 'adamw_torch_4bit'?"),
    ],
)
def test_what_cannot_be_is_refused_with_the_mend(train: dict[str, Any], said: str) -> None:
    assert said in problems(train)


@pytest.mark.parametrize(
    ("train", "adapter"),
    [
        ({"optimizer": "muon"}, "none"),
        (FREE, "lora"),
        ({"scheduler": "cosine", "betas": [0.0, 0.99]}, "lora"),
        (
            {"groups": [{"match": "norm", "weight_decay": 0.0}, {"match": r"\d", "learning_rate": 1e-3}]},
            "lora",
        ),
    ],
)
def test_what_can_be_is_not(train: dict[str, Any], adapter: str) -> None:
    assert problems(train, adapter) == ""
