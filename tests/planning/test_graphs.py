"""Graphs are recorded where the host is slower than the device."""

from __future__ import annotations

import pytest

from tunesmith.planning.graphs import graphs_pay


@pytest.mark.parametrize(
    ("parameters", "tokens", "expected"),
    [
        (3.5e6, 4096, True),
        (3.5e6, 16_384, True),
        (61e6, 2048, True),
        (218e6, 8192, False),
        (856e6, 4096, False),
    ],
    ids=["135M", "135M-long", "1B", "8B", "70B"],
)
def test_small_models_and_short_rows(parameters, tokens, expected):
    for full in (False, True):
        assert graphs_pay(tokens=tokens, layer_parameters=parameters, full=full) is expected


def test_gradients_of_weights_are_a_third_product():
    for full, tokens in (
        (False, 4000),
        (True, 2666),
    ):  # what the device does of 2.5 ms at 4e14 operations a second
        assert graphs_pay(tokens=tokens, layer_parameters=62.4e6, full=full)
        assert not graphs_pay(tokens=tokens + 20, layer_parameters=62.4e6, full=full)
