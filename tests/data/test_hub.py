"""Data sets on the hub, without a network: what is passed on, and what failures become."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from tunesmith.contracts.errors import DataError
from tunesmith.data.hub import explain_failure, looks_like_hub_name
from tunesmith.data.sources import open_source


def serve(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    def load(path: str, **arguments: Any) -> Any:
        calls.append({"path": path, **arguments})
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(datasets, "load_dataset", load)
    return calls


def test_rows_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_list([{"n": 0, "x": {"a": 1}}, {"n": 1, "x": {"b": 2}}])
    calls = serve(monkeypatch, rows)
    source = open_source("org/name", split="test[:2]", name="main", revision="v1")
    assert not calls, "nothing is loaded before it is asked for"
    assert [row.record for row in source.rows()] == [{"n": 0, "x": {"a": 1}}, {"n": 1, "x": {"b": 2}}]
    assert next(source.rows()).where == "org/name:row 0"
    assert source.fingerprint() == rows._fingerprint
    assert calls == [{"path": "org/name", "split": "test[:2]", "name": "main", "revision": "v1"}]


@pytest.mark.parametrize(("split", "passed"), [(None, "train"), ("[5:]", "train[5:]"), ("dev", "dev")])
def test_the_default_split_is_train(monkeypatch: pytest.MonkeyPatch, split: str | None, passed: str) -> None:
    calls = serve(monkeypatch, datasets.Dataset.from_list([{"n": 0}]))
    list(open_source("name", split=split).rows())
    assert calls[0]["split"] == passed


@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'org/name' doesn't exist on the Hub"),
            "not found",
            "hf auth login",
        ),
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'org/name' is a gated dataset on the Hub."),
            "gated",
            "hf auth login",
        ),
        (
            ConnectionError("Couldn't reach 'org/name' on the Hub (LocalEntryNotFoundError)"),
            "reached",
            "network",
        ),
        (OfflineModeIsEnabled("offline mode is enabled"), "reached", "HF_HUB_OFFLINE"),
        (ValueError("Config name is missing.\nPlease pick one"), "several configurations", "`name`"),
        (ValueError("Unknown split \"tset\". Should be one of ['train']."), "no such split", "split"),
        (
            RuntimeError("Dataset scripts are no longer supported, but found x.py"),
            "loading script",
            "Parquet",
        ),
        (ArithmeticError("something new\nwith details"), "cannot be loaded: something new", None),
    ],
)
def test_failures_become_one_sentence(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str, hint: str | None
) -> None:
    serve(monkeypatch, error)
    with pytest.raises(DataError) as caught:
        list(open_source("org/name").rows())
    assert message in caught.value.message
    assert "'org/name'" in caught.value.message
    assert "\n" not in caught.value.message
    assert hint is None or hint in (caught.value.hint or "")


def test_an_error_without_text_is_named_by_its_type() -> None:
    assert "ArithmeticError" in explain_failure("x", ArithmeticError()).message


def test_what_looks_like_a_name() -> None:
    assert all(map(looks_like_hub_name, ["name", "org/name", "org/name-1.0_x"]))
    assert not any(map(looks_like_hub_name, ["a/b/c", "./a", "/a", "../a", "~/a", "a b", "a/", ""]))
