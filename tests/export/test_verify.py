"""The comparison of a merged model with base and adapter: what is right passes, and what is wrong does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.results import adapted
from tests.support.tiny import save_tiny_model, tiny_llama
from tunesmith.export.merged_weights import from_memory, merged_tensors
from tunesmith.export.verify import Verification, compare, disturb, log_probabilities, rounding_of

SIZE = {"hidden_size": 64, "intermediate_size": 128}
PROMPTS = [list(range(3, 40)), [100, 7, 9]]
PROJECTION = "model.layers.0.self_attn.o_proj.weight"


def verified(
    tmp_path: Path,
    dtype: torch.dtype,
    *,
    quantize: str = "none",
    spoil: Callable[[Any, Any], None] | None = None,
) -> Verification:
    """Merge as the files would have it, spoil something, compare."""
    model = adapted(save_tiny_model(tmp_path / "base", **SIZE), quantize)
    expected = log_probabilities(model, PROMPTS)
    with model.disable_adapter():
        base = log_probabilities(model, PROMPTS)
        plain = {n: t.detach().clone() for n, t in merged_tensors(model.get_base_model(), from_memory)}
    state = {n: t.detach().to(dtype).float() for n, t in merged_tensors(model.get_base_model(), from_memory)}
    if spoil is not None:
        spoil(state, plain)
    merged = tiny_llama(**SIZE)
    merged.load_state_dict(state)
    return compare(
        merged,
        PROMPTS,
        expected=expected,
        base=base,
        dtype=dtype,
        computed_in=torch.float32,
        quantize=quantize,
    )


def test_log_probabilities_are_of_all_places() -> None:
    found = log_probabilities(tiny_llama(), PROMPTS)
    assert found.shape == (40, 384)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(40))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
def test_what_was_merged_rightly_is_good(tmp_path: Path, dtype: torch.dtype, quantize: str) -> None:
    found = verified(tmp_path, dtype, quantize=quantize)
    assert found.good
    assert found.telling
    assert found.tolerance < found.adapter_effect / 5  # type: ignore[operator]
    assert found.tokens == 40
    assert found.as_json()["good"] is True


def _left_out(state: Any, plain: Any) -> None:
    state[PROJECTION] = plain[PROJECTION]


def _scaled(state: Any, plain: Any) -> None:
    for name in state:
        state[name] = plain[name] + 0.8 * (state[name] - plain[name])


def _transposed(state: Any, plain: Any) -> None:
    state[PROJECTION] = plain[PROJECTION] + (state[PROJECTION] - plain[PROJECTION]).T


def _not_a_number(state: Any, _: Any) -> None:
    state[PROJECTION][0, 0] = float("nan")


@pytest.mark.parametrize("spoil", [_left_out, _scaled, _transposed, _not_a_number])
def test_what_was_merged_wrongly_is_not(tmp_path: Path, spoil: Any) -> None:
    assert not verified(tmp_path, torch.bfloat16, spoil=spoil).good


def test_weights_are_moved_by_no_more_than_they_may() -> None:
    model, plain = tiny_llama(), dict(tiny_llama().named_parameters())
    disturb(model, 0.01)
    for name, moved in model.named_parameters():
        share = ((moved - plain[name]) / plain[name]).nan_to_num().abs().max().item()
        assert 0.005 < share < 0.0101, name


def test_an_adapter_that_does_nothing_says_nothing() -> None:
    values = {"largest_difference": 0.1, "mean_difference": 0.0, "tolerance": 0.2, "rounding": 0.1}
    for effect, telling in ((0.15, False), (0.3, True), (None, True)):
        found = Verification(
            **values, adapter_effect=effect, dtype="bfloat16", computed_in="float32", tokens=1
        )
        assert (found.good, found.telling) == (True, telling)


def test_rounding_of_the_types() -> None:
    assert rounding_of(torch.bfloat16, torch.float32, "none") == 2.0**-8
    assert rounding_of(torch.float32, torch.float32, "none") == 2.0**-22
    assert rounding_of(torch.float32, torch.bfloat16, "nf4") == 2.0**-6
    assert rounding_of(torch.bfloat16, torch.float32, "int8") == 2.0**-6
