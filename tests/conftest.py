"""Shared by all tests: no network, a private cache, and the number of threads that CI has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest

from tests.support.tiny import save_tiny_model


@pytest.fixture(autouse=True)
def _same_environment() -> Iterator[None]:
    """`datasets` puts a copy in the place of `os.environ` after a map in several processes; rich reads the first."""
    before = os.environ
    yield
    os.environ = before  # noqa: B003


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
