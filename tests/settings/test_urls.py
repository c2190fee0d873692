"""What of an address may be shown, and that settings and their mistakes show no more."""

from __future__ import annotations

import json

import pytest

from tunesmith.config.load import load_settings
from tunesmith.config.prepare_data import names_of
from tunesmith.config.run_dir import resolved_yaml
from tunesmith.contracts.errors import ConfigError
from tunesmith.settings.urls import is_url, shown, shown_text


@pytest.mark.parametrize(
    ("url", "seen"),
    [
        ("https://host/a/rows.jsonl", "https://host/a/rows.jsonl"),
        ("https://me:word@host:8443/a.jsonl", "https://…@host:8443/a.jsonl"),
        ("https://word@host/a.jsonl", "https://…@host/a.jsonl"),
        ("https://host/a.jsonl?X-Amz-Signature=word&X-Amz-Date=word", "https://host/a.jsonl?X-Amz-Signature=…&X-Amz-Date=…"),
        ("https://host/a.jsonl?download=true&token=word", "https://host/a.jsonl?download=true&token=…"),
        ("https://host/a.jsonl?revision=" + "word" * 17, "https://host/a.jsonl?revision=…"),
        ("https://host/a.jsonl?word", "https://host/a.jsonl?…"),
        ("https://host/a.jsonl#word", "https://host/a.jsonl"),
        ("https://me:wo/rd@host/a.jsonl", "https://…"),
        ("https://[word/a.jsonl", "https://…"),
        ("s3://bucket/rows-*.jsonl", "s3://bucket/rows-*.jsonl"),
        ("data/rows.jsonl?word", "data/rows.jsonl?word"),
        ("org/name", "org/name"),
    ],
)  # fmt: skip
def test_what_is_shown(url: str, seen: str) -> None:
    assert shown(url) == seen
    assert shown(shown(url)) == seen
    assert is_url(url) == ("://" in url)


def test_addresses_in_a_text() -> None:
    text = "override 'data.train.0=https://me:word@host/a.jsonl?x=word' and s3://b/c"
    assert shown_text(text) == "override 'data.train.0=https://…@host/a.jsonl?x=…' and s3://b/c"


URL = "https://me:word@host/a.jsonl?token=word"


def test_settings_that_are_written_or_printed_hide_it_and_those_that_are_read_do_not() -> None:
    settings = load_settings(
        {"model": {"name": "x"}, "data": {"train": [{"path": URL}, {"path": URL + "2"}]}}
    )
    assert settings.data.train[0].path == URL
    written = (
        resolved_yaml(settings)
        + json.dumps(settings.model_dump(mode="json"))
        + repr(settings)
        + str(settings)
    )
    assert "word" not in written
    assert "https://…@host/a.jsonl?token=…" in written
    assert names_of(settings.data.train) == [f"https://…@host/a.jsonl?token=…{end}" for end in ("", " #2")]


@pytest.mark.parametrize(
    "data", [{"train": URL}, {"train": [URL]}, {"train": [{"path": "a", "weight": URL}]}]
)
def test_mistakes_beside_an_address_do_not_show_it(data: dict[str, object]) -> None:
    made = {"model": {"name": "x"}, "data": data}
    with pytest.raises(ConfigError) as caught:
        load_settings(made)
    assert "word" not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        load_settings(
            made | {"data": {"train": [{"path": "a"}]}}, [f"data.train.0={URL}", f"nothing at all {URL}"]
        )
    assert "word" not in str(caught.value)
