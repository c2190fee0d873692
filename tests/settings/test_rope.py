"""What a scaling of rotary positions needs, by its kind; each mistake is one sentence at its own setting."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from tunesmith.config.load import load_settings
from tunesmith.contracts.errors import ConfigError
from tunesmith.settings.rope import KINDS, RopeScaling, scaling_problems

RIGHT: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.8, "truncate": False},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {"short_factor": [1.0, 1.1], "long_factor": [1, 2.5], "attention_factor": 1.2},
}

WRONG = [
    ({"rope_type": "yarn"}, "rope_type", "yarn without factor", "it needs factor"),
    (
        {"rope_type": "llama3", "factor": 8.0},
        "rope_type",
        "llama3 without low_freq_factor and high_freq_factor",
        "it needs factor and low_freq_factor and high_freq_factor",
    ),
    (
        {"rope_type": "linear", "factor": 2.0, "beta_fast": 32.0},
        "beta_fast",
        "linear with beta_fast",
        "that is of yarn: remove it",
    ),
    (
        {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 4096},
        "original_max_position_embeddings",
        "dynamic with original_max_position_embeddings",
        "that is of yarn and llama3 and longrope: remove it",
    ),
    (
        {"rope_type": "yarn", "factor": 2.0, "beta_fast": 1.0, "beta_slow": 1.0},
        "beta_fast",
        "beta_fast is not above beta_slow",
        "fast frequencies turn more often than slow ones",
    ),
    (
        {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0},
        "mscale",
        "one of mscale and mscale_all_dim",
        "only their ratio counts: set both, or neither",
    ),
    (
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
        "high_freq_factor",
        "high_freq_factor is not above low_freq_factor",
        "high frequencies turn more often than low ones: Llama 3.1 has 4 and 1",
    ),
    (
        {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0, 2.0]},
        "long_factor",
        "short_factor has 1 numbers and long_factor 2",
        "both have one for each pair of rotated channels",
    ),
]


def settings(scaling: dict[str, Any]) -> Any:
    return load_settings(
        {"model": {"name": "x", "rope_scaling": scaling}, "data": {"train": [{"path": "a"}]}}
    )


@pytest.mark.parametrize("kind", RIGHT)
def test_what_is_set_goes_to_transformers_as_it_is(kind: str) -> None:
    given = {"rope_type": kind, **RIGHT[kind]}
    assert settings(given).model.rope_scaling.parameters() == given


def test_the_table_and_the_setting_know_the_same() -> None:
    assert set(get_args(RopeScaling.model_fields["rope_type"].annotation)) == set(KINDS) == set(RIGHT)
    names = {name for kind in KINDS.values() for name in (*kind.needs, *kind.takes)}
    assert names | {"rope_type"} == set(RopeScaling.model_fields)


@pytest.mark.parametrize(("scaling", "name", "found", "expected"), WRONG)
def test_what_is_wrong_between_parameters(
    scaling: dict[str, Any], name: str, found: str, expected: str
) -> None:
    assert list(scaling_problems(scaling)) == [(name, found, expected)]
    with pytest.raises(ConfigError) as caught:
        settings(scaling)
    (problem,) = caught.value.problems
    assert problem.where == f"model.rope_scaling.{name}"
    assert (problem.found, problem.expected) == (f"model.rope_scaling: {found}", expected)


@pytest.mark.parametrize(
    ("scaling", "sentence"),
    [
        ({"rope_type": "yarm", "factor": 2.0}, "did you mean 'yarn'"),
        ({"factor": 2.0}, "model.rope_scaling.rope_type is missing"),
        ({"rope_type": "linear", "factor": 0.5}, "expected a number of at least 1"),
        ({"rope_type": "linear", "factor": "2"}, "expected a number"),
        ({"rope_type": "linear", "faktor": 2.0}, "did you mean factor"),
        ({"rope_type": "longrope", "short_factor": [0.0], "long_factor": [1.0]}, "expected a number above 0"),
    ],
)
def test_what_is_wrong_with_one_parameter(scaling: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        settings(scaling)
