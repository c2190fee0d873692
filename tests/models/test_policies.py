"""Policies that differ from layer to layer, and what each of them leaves lying about between forward and backward."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from tests.models import test_families as families
from tests.models.test_decoder_truths import batch_of, computed, hidden_of, rounded
from tests.models.test_probe import adapted
from tunesmith.models.install import install
from tunesmith.models.policy import POLICIES, STAGES, Policy

LAYERS = 12
ORDERS = {
    "lean-first": ["offload"] * 4 + ["recompute"] * 4 + ["keep"] * 4,
    "rich-first": ["keep_all"] * 4 + ["keep_offload_attention"] * 4 + ["recompute_projections"] * 4,
    "in-turn": ["keep", "offload"] * 6,
    "travel-between": ["offload_attention", "recompute", "keep_offload_attention", "offload", "keep", "keep"]
    * 2,
    "one": ["recompute_gate_up"] * 11 + ["offload_attention"],
    **{f"random-{seed}": random.Random(seed).choices(list(POLICIES), k=LAYERS) for seed in range(3)},
}


def check_mixed(
    names: list[str], dtype: torch.dtype, device: str, lengths: list[int], dropout: float
) -> None:
    """Outputs and gradients are those of `keep`, bit for bit, in two passes of one installation."""
    model = rounded(dtype, layers=LAYERS, rank=8, dropout=dropout).to(device).train(dropout > 0.0)
    batch, installed = batch_of(lengths=lengths), install(model)
    torch.manual_seed(0)
    hidden, grads = computed(model, dtype, batch)
    installed.set_policies(names)
    for _ in range(2):
        torch.manual_seed(0)
        other, other_grads = computed(model, dtype, batch)
        assert torch.equal(other, hidden)
        assert [name for name in grads if not torch.equal(other_grads[name], grads[name])] == []
    assert installed.fallbacks == {}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("order", ORDERS)
def test_layers_of_different_policies_compute_the_same(order, dropout):
    check_mixed(ORDERS[order], torch.bfloat16, "cpu", [7, 1, 19, 2, 30, 1], dropout)


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("order", ORDERS)
def test_layers_of_different_policies_compute_the_same_on_the_gpu(order, dropout):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        check_mixed(ORDERS[order], torch.bfloat16, "cuda", [130, 1, 257, 64, 3, 57], dropout)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("family", ["gemma2", "cohere2", "starcoder2", "phi3", "olmo2"])
def test_families_take_policies_layer_by_layer(family):
    changes: dict[str, Any] = {"num_hidden_layers": 3, "sliding_window": None}
    model = families.tiny(family, changes | {"head_dim": 8}, torch.float32, rank=8)
    batch, installed = families.packed_row(), install(model)
    logits, grads = families.computed(model, batch)
    installed.set_policies(["offload", "recompute_projections", "keep_offload_attention"])
    other, other_grads = families.computed(model, batch)
    assert installed.fallbacks == {}
    assert torch.equal(other, logits)
    assert [name for name in grads if not torch.equal(other_grads[name], grads[name])] == []


def test_each_layer_obeys_its_own_policy():
    """Bytes that autograd holds of three layers are those of the three policies, one each."""
    names = ("keep", "recompute", "recompute_gate_up")
    model = rounded(torch.float32, layers=3)
    installed = install(model)
    uniform = {}
    for name in names:
        installed.set_policy(name)
        uniform[name] = saved_bytes(model)
    installed.set_policies(names)
    assert saved_bytes(model) == pytest.approx(sum(uniform.values()) / 3, rel=1e-9)


def saved_bytes(model: Any) -> int:
    """Of all that autograd saves."""
    held: dict[int, int] = {}
    kept = []  # so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        hidden_of(model, torch.float32, batch_of())
    return sum(held.values())


# ---------------------------------------------------------------------- how they are named


def test_the_table_says_how_many_layers_do_what():
    installed = install(rounded(torch.float32, layers=32))
    assert installed.table() == [("32 decoder layers", "fused", "activations: keep")]
    installed.set_policies(["recompute"] * 20 + ["keep"] * 12)
    assert installed.table() == [("32 decoder layers", "fused", "activations: 20 layers recompute, 12 keep")]
    installed.set_policy("offload")
    assert installed.table() == [("32 decoder layers", "fused", "activations: offload")]
    assert installed.policy is POLICIES["offload"]


def test_a_stock_layer_in_between_has_a_place_and_no_policy():
    model = adapted(num_hidden_layers=3)
    layers = model.get_base_model().model.layers
    layers[1].__class__ = type("Other", (type(layers[1]),), {})  # not one of transformers
    installed = install(model)
    installed.set_policies(["recompute", "offload", "keep"])
    assert installed.table()[0] == ("2 decoder layers", "fused", "activations: 1 layer recompute, 1 keep")
    assert installed.recordable() == "not every decoder layer is fused"


def test_one_layer_that_travels_keeps_a_pass_from_being_recorded():
    installed = install(rounded(torch.float32, layers=3))
    installed.set_policies(["recompute", "keep", "recompute_projections"])
    assert installed.recordable() is None
    installed.set_policies(["recompute", "keep_offload_attention", "keep"])
    assert installed.recordable() == "keep_offload_attention moves activations to the host"


def test_a_plan_for_another_number_of_layers_is_refused():
    installed = install(rounded(torch.float32, layers=3))
    with pytest.raises(AssertionError):
        installed.set_policies(["keep"] * 2)


# ---------------------------------------------------------------------- what is left


@pytest.mark.parametrize("policy", POLICIES)
def test_backward_is_left_what_it_does_not_come_by_again(policy, monkeypatch):
    """Names of what a layer holds, by where it lies; sandwich norms and all."""
    seen = names_of(policy, "gemma2", monkeypatch)
    keep, offload = POLICIES[policy].keep, POLICIES[policy].offload
    small = {"u_output", "u_down", "behind1"}
    small |= {"before0", "u_qkv"} if "qkv" in keep else set()
    small |= {"before1", "u_gate_up"} if "gate_up" in keep else set()
    small |= {"behind0"} if "act" in keep else set()  # comes with the stream after attention
    stream = {"middle"} if "act" in keep else set()
    large = {"qkv": {"qkv"}, "attention": {"output"}, "middle": {"branch0", "branch1"} | stream}
    large |= {"gate_up": {"gate_up"}, "act": {"act"}, "input": {"input"}, "weights": set()}
    moves = set().union(*(large[stage] for stage in offload))
    stays = set().union(*(large[stage] for stage in (*keep, "input") if stage not in offload)) | small
    if policy == "offload":
        stays, moves = set(), {"input"} | small
    assert seen == (stays, moves)


def names_of(policy: str, family: str, monkeypatch: pytest.MonkeyPatch) -> tuple[set[str], set[str]]:
    """What the first layer leaves on the device and what it has moved."""
    from tunesmith.models.decoder import _DecoderLayer

    found = []
    backward = _DecoderLayer.backward

    def spied(ctx: Any, *grads: torch.Tensor) -> Any:
        found.append((set(ctx.stays), set(ctx.moves)))
        return backward(ctx, *grads)

    monkeypatch.setattr(_DecoderLayer, "backward", staticmethod(spied))
    model = families.tiny(family, {"sliding_window": 5}, torch.float32, rank=8)
    families.fused(model, families.packed_row(), policy)
    assert len(found) == 2
    return found[0]


def test_nothing_of_a_tokens_width_stays_on_the_device_under_offload():
    """What autograd itself holds of fused layers, which on a GPU is what is left there."""
    model = rounded(torch.float32, layers=2)
    install(model, policy="offload")
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    base = model.get_base_model().get_decoder()
    hidden = torch.randn(1, 60, 64, requires_grad=True)
    angle = torch.randn(1, 60, 8).repeat(1, 1, 2)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        for layer in base.layers:
            hidden = layer(hidden, position_embeddings=(angle.cos(), angle.sin()))
    assert kept == []


# ---------------------------------------------------------------------- rows of the table


def test_a_row_says_nothing_that_cannot_be():
    for keep, offload in (({"act"}, set()), (set(), {"qkv"}), ({"norm"}, set())):
        with pytest.raises(AssertionError):
            Policy("wrong", frozenset(keep), frozenset(offload))
    assert all(policy.keep <= {*STAGES, "weights"} for policy in POLICIES.values())
