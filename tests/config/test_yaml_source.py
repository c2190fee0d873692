"""YAML as people mean it: scalars, places, duplicates, merge keys, and what is no YAML."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.config.yaml_source import parse_yaml


def read(text: str) -> Any:
    document = parse_yaml(text, "run.yaml")
    assert document.problems == []
    return document.data


def problems(text: str) -> list[str]:
    return [str(problem) for problem in parse_yaml(text, "run.yaml").problems]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("2.0e-4", 2e-4),
        ("1E3", 1000.0),
        ("-.5", -0.5),
        ("5.", 5.0),
        ("1_000", 1000),
        ("1_000.5", 1000.5),
        ("+3", 3),
        ("-0", 0),
        ("010", 10),
        ("08", 8),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("null", None),
        ("", None),
    ],
)
def test_a_scalar_is_what_it_looks_like(text: str, value: object) -> None:
    found = read(f"key: {text}\n")["key"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "text",
    ["no", "yes", "on", "off", "Y", "1:30", "0x1F", "0b11", "2024-01-01", "1e", "e5", "nan", "tRUE", "1.2.3"],
)
def test_what_yaml_1_1_would_convert_stays_text(text: str) -> None:
    assert read(f"key: {text}\n") == {"key": text}


def test_not_a_number_is_a_number() -> None:
    assert math.isnan(read("key: .nan\n")["key"])


def test_quotes_make_text() -> None:
    assert read("a: '2e-4'\nb: \"true\"\nc: ''\n") == {"a": "2e-4", "b": "true", "c": ""}


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_python_writes_is_read_back(number: float) -> None:
    assert read(f"key: {number!r}\n")["key"] == number


@given(st.integers())
def test_every_whole_number_is_read_back(number: int) -> None:
    assert read(f"key: {number}\n")["key"] == number


def test_every_key_and_entry_has_its_line() -> None:
    document = parse_yaml("model:\n  name: x\ndata:\n  train:\n    - path: a\n    - path: b\n", "run.yaml")
    assert document.place(("model",)) == "run.yaml:1"
    assert document.place(("model", "name")) == "run.yaml:2"
    assert document.place(("data", "train", 0, "path")) == "run.yaml:5"
    assert document.place(("data", "train", 1)) == "run.yaml:6"


def test_what_is_not_there_has_the_place_of_the_section_around_it() -> None:
    document = parse_yaml("a: 1\ntrain:\n  seed: 1\n", "run.yaml")
    assert document.place(("train", "steps")) == "run.yaml:2"
    assert document.place(("nothing", "at", "all")) == "run.yaml:1"


def test_a_dict_has_names_for_places() -> None:
    from tunesmith.config.yaml_source import Document

    assert Document(data={}).place(("train", "steps")) == "train.steps"


def test_every_key_given_twice_is_named_with_both_lines() -> None:
    assert problems("a: 1\nb: 2\na: 3\nc: {d: 1, d: 2}\n") == [
        "run.yaml:3: a is given twice; it already stands at run.yaml:1",
        "run.yaml:4: d is given twice; it already stands at run.yaml:4",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "base: &base {x: 1, y: 2}\nhere:\n  <<: *base\n  y: 3\n",
        "base: &base {x: 1, y: 2}\nhere:\n  y: 3\n  <<: *base\n",
    ],
)
def test_a_merged_section_yields_to_what_stands_here(text: str) -> None:
    document = parse_yaml(text, "run.yaml")
    assert document.problems == []
    assert document.data["here"] == {"x": 1, "y": 3}
    own = 1 + text.splitlines().index("  y: 3")
    assert document.place(("here", "y")) == f"run.yaml:{own}"
    assert document.place(("here", "x")) == "run.yaml:1"


def test_of_several_merged_sections_the_first_counts_most() -> None:
    text = "a: &a {x: 1}\nb: &b {x: 2, y: 2}\nhere:\n  <<: [*a, *b]\n"
    assert read(text)["here"] == {"x": 1, "y": 2}


def test_a_merge_of_something_else_is_a_problem() -> None:
    assert problems("a: 1\nhere:\n  <<: 5\n") == [
        "run.yaml:3: << without a section; expected an alias of a section"
    ]


def test_an_alias_is_a_copy_of_the_value() -> None:
    assert read("a: &a [1, 2]\nb: *a\n") == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("model:\n\tname: x\n", "run.yaml:2: found character '\\t' that cannot start any token"),
        ("model: {name: x\n", "run.yaml:2: expected ',' or '}', but got '<stream end>'"),
        ("a: b: c\n", "run.yaml:1: mapping values are not allowed here"),
        ("a: 1\n---\nb: 2\n", "run.yaml:2: expected a single document in the stream, but found another"),
        ("a: *nothing\n", "run.yaml:1: found undefined alias 'nothing'"),
        ("a: 'never closed\n", "run.yaml:2: found unexpected end of stream"),
        ("ok: 1\nb: \x00\n", "run.yaml:2: the character U+0000"),
        ("a: &a [*a]\n", "run.yaml: nested too deeply"),
        ("1: x\n", "run.yaml:1: the key 1"),
        ("[a, b]: x\n", "run.yaml:1: a list or a section as a key"),
        ("a: !!int abc\n", "run.yaml:1: 'abc' as !!int"),
        ("a: !!bool abc\n", "run.yaml:1: 'abc' as !!bool"),
        ("a: !!python/name:os.system x\n", "run.yaml:1: the tag !!python/name:os.system"),
        ("a: !!timestamp x\n", "run.yaml:1: the tag !!timestamp"),
        ("a: !own x\n", "run.yaml:1: the tag !own"),
    ],
)
def test_what_is_wrong_is_collected_and_never_raised(text: str, problem: str) -> None:
    found = problems(text)
    assert len(found) == 1
    assert found[0].startswith(problem)


def test_a_tab_and_a_colon_come_with_advice() -> None:
    assert problems("a:\n\tb: 1\n")[0].endswith("(indent with spaces)")
    assert problems("a: b: c\n")[0].endswith("quote text that holds a colon)")


def test_a_byte_order_mark_is_no_part_of_the_first_name() -> None:
    assert read("\ufeffmodel: x\n") == {"model": "x"}


@given(st.text(max_size=60))
def test_no_text_raises_and_every_problem_has_a_place(text: str) -> None:
    for problem in parse_yaml(text, "run.yaml").problems:
        assert problem.where.startswith("run.yaml")
        assert problem.found
