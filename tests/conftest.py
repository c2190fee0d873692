"""Shared by all tests: no network, a private cache, and the number of threads that CI has."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest

from tests.support.tiny import save_tiny_model


@pytest.fixture(autouse=True)
def _private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer as a Hugging Face folder."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def wide_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with rows of 64 and 128 weights: in 4 bits bitsandbytes' CPU code computes rightly with no others."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    return save_tiny_model(folder, hidden_size=64, intermediate_size=128)
