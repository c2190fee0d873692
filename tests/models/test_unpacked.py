"""4-bit weights that a layer holds unpacked: made once, the same numbers, and nothing stale."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from tests.models.test_decoder import fill
from tests.models.test_decoder_truths import batch_of, computed, hidden_of
from tests.support.four_bits import in_nf4
from tests.support.tiny import tiny_llama
from tunesmith.models import projections
from tunesmith.models.adapter import add_lora
from tunesmith.models.install import Installed, install

FULL = "keep_all_unpacked"
WEIGHTS = 7
"""Linear layers of a decoder layer."""


def qlora(*, rank: int = 8, layers: int = 2, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A model in 4 bits with float32 adapters, those of `rank` 3 too narrow to share GEMMs with the weights."""
    size = {"hidden_size": 64, "intermediate_size": 192} if device == "cpu" else {
        "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2
    }  # fmt: skip
    base = tiny_llama(num_hidden_layers=layers, **size).to(device)
    model = add_lora(
        in_nf4(base, dtype), rank=rank, alpha=2.0 * rank, dropout=0.0, targets="all-linear", seed=1
    )
    fill(model)
    for name, parameter in model.named_parameters():
        if "lora_" not in name and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


@pytest.fixture
def written() -> Iterator[mock.Mock]:
    """Counts the weights that are unpacked."""
    with mock.patch.object(projections, "write_weight", wraps=projections.write_weight) as counter:
        yield counter


def held_bytes(installed: Installed) -> list[int]:
    return [unpacked.bytes for _, unpacked in sorted(installed._unpacked.items())]


def check_same(model: Any, dtype: torch.dtype, lengths: list[int]) -> None:
    """Passes are those of `keep_all`, bit for bit, with adapters that change in between."""
    installed, batch = install(model, policy="keep_all"), batch_of(lengths=lengths)
    for names in (["keep", "keep_unpacked"], ["keep_unpacked", FULL], [FULL, "keep_all"]):
        installed.set_policy("keep_all")
        hidden, grads = computed(model, dtype, batch)
        installed.set_policies(names * (len(installed.policies) // 2))
        for _ in range(2):
            other, other_grads = computed(model, dtype, batch)
            assert torch.equal(other, hidden)
            assert [name for name in grads if not torch.equal(other_grads[name], grads[name])] == []
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(grads[name], alpha=1e-3)
    assert installed.fallbacks == {}


@pytest.mark.parametrize("rank", [8, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_held_computes_the_same(dtype, rank):
    check_same(qlora(rank=rank, dtype=dtype), dtype, [7, 1, 19, 2, 30, 1])


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [8, 3])
def test_what_is_held_computes_the_same_on_the_gpu(rank):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        model = qlora(rank=rank, layers=4, device="cuda", dtype=torch.bfloat16)
        check_same(model, torch.bfloat16, [130, 1, 257, 64, 3, 57])
    finally:
        torch.use_deterministic_algorithms(False)


def test_weights_are_unpacked_once_whatever_the_passes(written):
    model = qlora()
    installed = install(model, policy=FULL)
    for _ in range(3):
        computed(model, torch.float32, batch_of())
    assert written.call_count == 2 * WEIGHTS
    installed.set_policies([FULL, "keep_all"])
    computed(model, torch.float32, batch_of())
    assert written.call_count == 2 * WEIGHTS + 2 * WEIGHTS, "the second layer's, forward and backward"


def test_other_policies_let_go_of_them():
    model = qlora()
    installed = install(model, policy=FULL)
    hidden_of(model, torch.float32, batch_of())
    assert len(held_bytes(installed)) == 2
    assert min(held_bytes(installed)) > 0
    installed.set_policies([FULL, "keep_all"])
    assert len(held_bytes(installed)) == 1
    installed.undo()
    assert held_bytes(installed) == []


def test_weights_of_16_bits_are_not_held_a_second_time(written):
    model = add_lora(
        tiny_llama(hidden_size=64, intermediate_size=192).requires_grad_(False),
        rank=8, alpha=8.0, dropout=0.0, targets="all-linear", seed=1,
    )  # fmt: skip
    installed = install(model, policy=FULL)
    hidden, grads = computed(model, torch.float32, batch_of())
    assert held_bytes(installed) == [0, 0]
    assert written.call_count == 0
    installed.set_policy("keep_all")
    other, other_grads = computed(model, torch.float32, batch_of())
    assert torch.equal(hidden, other)
    assert all(torch.equal(grads[name], other_grads[name]) for name in grads)


def test_a_group_of_which_one_weight_is_in_16_bits_is_not_held(written):
    """PEFT merges into such a weight without a trace."""
    model = qlora()
    attention = model.get_base_model().model.layers[0].self_attn
    attention.k_proj.base_layer = torch.nn.Linear(64, attention.k_proj.out_features, bias=False)
    model.requires_grad_(False)
    install(model, policy=FULL)
    for _ in range(2):
        hidden_of(model, torch.float32, batch_of())
    assert written.call_count == 2 * WEIGHTS + 3, "q, k and v of the first layer a second time"


def test_they_are_made_again_where_they_were_forgotten(written):
    model = qlora()
    installed = install(model, policy=FULL)
    hidden, _ = computed(model, torch.float32, batch_of())
    installed.forget_unpacked()
    assert held_bytes(installed) == []
    again, _ = computed(model, torch.float32, batch_of())
    assert torch.equal(again, hidden)
    assert written.call_count == 2 * 2 * WEIGHTS


def test_what_is_made_while_sampling_serves_training():
    model = qlora()
    install(model, policy=FULL)
    with torch.inference_mode():
        sampled = hidden_of(model, torch.float32, batch_of())
    hidden, grads = computed(model, torch.float32, batch_of())
    assert torch.equal(hidden, sampled)
    assert grads


def test_a_model_without_its_adapter_reads_the_same_weights(written):
    """As the reference of DPO does: what was made with room for adapters serves without."""
    model = qlora()
    installed = install(model, policy=FULL)
    computed(model, torch.float32, batch_of())
    with model.disable_adapter():
        off = hidden_of(model, torch.float32, batch_of())
    computed(model, torch.float32, batch_of())
    assert written.call_count == 2 * WEIGHTS
    installed.set_policy("keep_all")
    with model.disable_adapter():
        assert torch.equal(off, hidden_of(model, torch.float32, batch_of()))


def test_what_was_made_without_room_is_made_again_with_it(written):
    model = qlora()
    installed = install(model, policy=FULL)
    with model.disable_adapter():
        hidden_of(model, torch.float32, batch_of())
    on, grads = computed(model, torch.float32, batch_of())
    assert written.call_count == 4 * WEIGHTS
    installed.set_policy("keep_all")
    other, other_grads = computed(model, torch.float32, batch_of())
    assert torch.equal(on, other)
    assert all(torch.equal(grads[name], other_grads[name]) for name in grads)


def test_weights_that_change_are_read_again():
    model = qlora()
    install(model, policy=FULL)
    batch = batch_of()
    before = hidden_of(model, torch.float32, batch).detach()
    down = model.get_base_model().model.layers[0].mlp.down_proj.base_layer
    with torch.no_grad():
        down.weight.copy_(down.weight.flip(0))
    changed = hidden_of(model, torch.float32, batch).detach()
    assert not torch.equal(changed, before)
    swapped = hidden_of(model, torch.float32, batch).detach()
    down.weight.data = down.weight.data.flip(0)  # neither another tensor nor another version
    assert not torch.equal(hidden_of(model, torch.float32, batch).detach(), swapped)
    # another tensor in its place
    up = model.get_base_model().model.layers[1].mlp.up_proj.base_layer
    up.weight = type(up.weight)(torch.zeros(192, 64), requires_grad=False, quant_type="nf4").to("cpu")
    assert not torch.equal(hidden_of(model, torch.float32, batch).detach(), changed)
