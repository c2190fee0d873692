"""Philox against the published vectors, and rounding to bfloat16 that is right on average."""

from __future__ import annotations

import pytest
import torch

from tunesmith.kernels.stochastic import philox, random_words_reference, to_bfloat16_reference

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("seed", "counter", "rounds", "expected"),
    [
        (0, 0, 10, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (2**64 - 1, ONES, 10, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (0, 0, 7, "5f6fb709 0d893f64 4f121f81 4f730a48"),
    ],
)
def test_philox_is_the_published_one(seed, counter, rounds, expected):
    """Known answers of the authors' own library, Random123."""
    words = philox(seed, tuple(torch.tensor([counter]) for _ in range(4)), rounds)
    assert " ".join(f"{int(word):08x}" for word in words) == expected


def test_words_belong_to_elements():
    step = torch.tensor(3.0)
    whole = random_words_reference(5, step, 2, range(100))
    assert torch.equal(random_words_reference(5, step, 2, range(40, 63)), whole[40:63])
    others = [
        random_words_reference(6, step, 2, range(100)),
        random_words_reference(5, step + 1, 2, range(100)),
        random_words_reference(5, step, 3, range(100)),
    ]
    assert all(int((other == whole).sum()) == 0 for other in others)
    far = random_words_reference(5, step, 2, range(2**36, 2**36 + 8))
    assert not torch.equal(far, whole[:8]), "elements past 2^34 are counted in the upper word"


def test_every_bit_is_set_half_of_the_time():
    words = random_words_reference(1, torch.tensor(1.0), 0, range(2**14))
    share = torch.stack([(words >> bit & 1).double().mean() for bit in range(32)])
    assert float((share - 0.5).abs().max()) < 5 * 0.5 / 2**7, "five standard errors"


@pytest.mark.parametrize("value", [1.001, -1.001, 3.14159, -0.3337, 1e-30, 256.7])
def test_rounding_is_right_on_average(value):
    """The share that is rounded up is that of the cut part; rounding to the nearest takes one side always."""
    count = 2**16
    words = random_words_reference(0, torch.tensor(1.0), 0, range(count))
    exact = torch.tensor([value], dtype=torch.float32)
    rounded = to_bfloat16_reference(exact.expand(count).contiguous(), words).double()
    low, high = float(rounded.min()), float(rounded.max())
    assert len(set(rounded.tolist())) == 2
    error = abs(float(rounded.mean()) - float(exact))
    assert error < 5 * 0.5 * (high - low) / count**0.5, "five standard errors"
    assert abs(float(exact.bfloat16()) - float(exact)) > 10 * error


def test_what_bfloat16_holds_is_not_rounded():
    values = torch.tensor([0.0, -0.0, 1.0, -3.5, float("inf"), float("-inf"), 3.3895e38, float("nan")])
    values = values.bfloat16().float()
    for word in (0, ONES):
        rounded = to_bfloat16_reference(values, torch.full((len(values),), word)).float()
        assert torch.equal(rounded[:-1], values[:-1])
        assert bool(rounded[-1].isnan())
    negative_nan = torch.tensor([-1], dtype=torch.int32).view(torch.float32)
    assert bool(to_bfloat16_reference(negative_nan, torch.tensor([ONES])).isnan()), "not carried into a zero"
