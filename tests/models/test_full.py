"""Full fine-tuning on the hand-written layer: what trains may differ from call to call, gradients are handed over
without a copy, and every policy, type and way of running gives those of stock layers.

`test_families.py` holds every family to transformers with all of its weights trained.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.models.test_families import (
    CASES,
    TOLERANCE,
    Outcome,
    base_of,
    computed,
    fused,
    packed_row,
    tiny,
    worst,
)
from tests.models.test_wanted_rows import _batch
from tests.models.test_wanted_rows import _outcome as loss_and_gradients
from tests.support.documents import random_corpus
from tests.support.tiny import tiny_llama
from tunesmith.data.batches import collate
from tunesmith.models.adapter import add_lora, train_all
from tunesmith.models.attention import document_kwargs, packed_attention
from tunesmith.models.install import install
from tunesmith.models.policy import POLICIES
from tunesmith.models.projections import Group, read_projection
from tunesmith.training.tensors import read_tensors, write_tensors

DOUBLE = 3 * TOLERANCE[torch.float64]


def whole(family: str = "llama", dtype: torch.dtype = torch.float64, case: int = 0) -> Any:
    return tiny(family, CASES[family][case], dtype, adapter=False)


def training(model: Any, *endings: str) -> Any:
    """The model with exactly those parameters trained whose names end so."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(endings))
    assert any(parameter.requires_grad for parameter in model.parameters())
    return model


# ---------------------------------------------------------------------- what trains


def test_layers_whose_weights_train_are_fused():
    model = tiny_llama()
    installed = install(model)
    assert installed.table() == [("2 decoder layers", "fused", "activations: keep")]
    model(input_ids=torch.arange(9)[None], use_cache=False).logits.sum().backward()
    assert installed.fallbacks == {}
    assert all(parameter.grad is not None for parameter in model.parameters())


PARTS = {
    "one of a group": ("q_proj.weight",),
    "two of a group": ("k_proj.weight", "up_proj.weight", "v_proj.weight"),
    "biases": ("bias",),
    "some biases": ("v_proj.bias", "o_proj.bias", "gate_proj.weight"),
    "norms": ("norm.weight",),
    "attention": ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"),
    "down": ("down_proj.weight",),
}


@pytest.mark.parametrize("policy", ["keep_all", "keep", "recompute"])
@pytest.mark.parametrize("part", PARTS)
def test_parts_of_a_layer(part, policy):
    model = training(whole(case=1), *PARTS[part])
    error, name = worst(fused(model, packed_row(), policy), computed(model, packed_row()))
    assert error < DOUBLE, name


@pytest.mark.parametrize("part", ["q_norm.weight", "k_norm.weight", "layernorm.weight"])
@pytest.mark.parametrize("family", ["qwen3", "olmo2", "gemma3_text", "cohere", "starcoder2"])
def test_norms_alone(family, part):
    model = whole(family)
    if not any(name.endswith(part) for name, _ in model.named_parameters()):
        pytest.skip("it has no such norm")
    training(model, part)
    error, name = worst(fused(model, packed_row(), "recompute"), computed(model, packed_row()))
    assert error < DOUBLE, name


@pytest.mark.parametrize("family", ["llama", "phi3", "olmo2", "cohere", "starcoder2"])
def test_weights_train_beside_an_adapter_on_them(family):
    model = tiny(family, CASES[family][0], torch.float64, rank=8)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "norm" in name or ".layers.1." in name)
    for policy in ("keep_all", "recompute"):
        error, name = worst(fused(model, packed_row(), policy), computed(model, packed_row()))
        assert error < DOUBLE, (policy, name)


def test_norms_that_peft_trains_beside_the_adapter():
    """`modules_to_save` wraps them, and the wrapper shows the weight that is active."""
    model = tiny("llama", {}, torch.float64, rank=8, modules_to_save=["input_layernorm"])
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.3
    ours, stock = fused(model, packed_row()), computed(model, packed_row())
    assert sum("modules_to_save" in name for name in ours[1]) == 2
    assert worst(ours, stock)[0] < DOUBLE


def test_biases_train_beside_an_adapter():
    model = tiny_llama(attention_bias=True, mlp_bias=True)
    model = add_lora(model, rank=3, alpha=6.0, dropout=0.0, targets=["q_proj"], seed=1, bias="all").double()
    ours, stock = fused(model, packed_row()), computed(model, packed_row())
    assert sum(name.endswith("bias") for name in ours[1]) == 14
    assert worst(ours, stock)[0] < DOUBLE


@pytest.mark.parametrize("frozen", [["model.layers.0.*"], ["*embed*", "*.layers.1.*"], ["*.mlp.*", "*norm*"]])
def test_layers_that_are_frozen_by_name(frozen):
    model = train_all(whole(dtype=torch.float32), frozen).double()
    ours, stock = fused(model, packed_row()), computed(model, packed_row())
    assert worst(ours, stock)[0] < DOUBLE
    assert len(ours[1]) < len(list(model.parameters()))


def test_what_trains_is_read_at_every_call():
    model = whole(dtype=torch.float64)
    installed = install(model)
    for endings in (("up_proj.weight",), ("norm.weight", "v_proj.weight"), ("",)):
        training(model, *endings)
        ours = computed(model, packed_row())
        assert ours[1].keys() == {name for name, _ in model.named_parameters() if name.endswith(endings)}
    assert installed.fallbacks == {}


def test_gradients_are_of_the_type_of_their_weights():
    model = whole("qwen3", torch.bfloat16)
    _, grads = fused(model, packed_row())
    assert {grad.dtype for grad in grads.values()} == {torch.bfloat16}


# ---------------------------------------------------------------------- how they are handed over


@pytest.mark.parametrize("family", ["llama", "phi3", "starcoder2"])
def test_gradients_of_a_group_lie_in_one_buffer_that_nobody_copied(family):
    model = whole(family, torch.float32)
    installed = install(model)
    computed_without_clearing(model)
    for layer in installed.layers:
        for name, parameter in layer.named_parameters():
            assert parameter.grad.is_contiguous(), name
        for path in (installed.row.qkv, installed.row.gate_up):
            grads = [layer.get_submodule(name).weight.grad for name in path]
            assert len({grad.untyped_storage().data_ptr() for grad in grads}) == 1
            at = grads[0].data_ptr()
            for grad in grads:
                assert grad.data_ptr() == at
                at += grad.nbytes


def computed_without_clearing(model: Any) -> None:
    with packed_attention(base_of(model), "sdpa"):
        model(**packed_row(), use_cache=False).logits.sum().backward()


@pytest.mark.parametrize("policy", POLICIES)
def test_two_micro_batches_add_up(policy):
    model = whole("qwen3")
    rows = []
    for seed in (1, 2):
        batch = collate(random_corpus([7, 1, 19, 5], seed=seed), range(4))
        inputs = {"input_ids": batch.ids_T[None], "position_ids": batch.position_ids_T[None]}
        rows.append(inputs | document_kwargs(batch))
    apart = [computed(model, row)[1] for row in rows]
    install(model, policy=policy)
    clear, model.zero_grad = model.zero_grad, lambda *_, **__: None  # `computed` clears what it has read
    computed(model, rows[0])
    together = computed(model, rows[1])[1]
    model.zero_grad = clear
    for name, grad in together.items():
        exact = apart[0][name] + apart[1][name]
        assert float((grad - exact).norm() / exact.norm()) < DOUBLE, name


def test_gradients_are_returned_and_not_written():
    model = whole("starcoder2")
    stock = computed(model, packed_row())[1]
    install(model)
    parameters = dict(model.named_parameters())
    weights = torch.randn(1, 60, 384, generator=torch.Generator().manual_seed(3)).double()
    with packed_attention(model, "sdpa"):
        loss = (model(**packed_row(), use_cache=False).logits * weights).sum()
    grads = torch.autograd.grad(loss, list(parameters.values()))
    assert all(parameter.grad is None for parameter in parameters.values())
    for (name, exact), grad in zip(stock.items(), grads, strict=True):
        assert float((grad - exact).norm() / exact.norm()) < DOUBLE, name


def test_in_place_steps_are_seen_by_the_next_forward():
    """The joined weights are the parameters themselves, which optimizers write in place."""
    models = whole("qwen2"), whole("qwen2")
    install(models[0])
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in models]
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            with packed_attention(model, "sdpa"):
                model(**packed_row(), use_cache=False).logits.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    attention = models[0].model.layers[0].self_attn
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    group = Group(tuple(map(read_projection, projections)))
    assert group.weight(torch.float64).data_ptr() == attention.q_proj.weight.data_ptr()
    for ours, stock in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-4)


def test_joined_weights_are_checkpointed_and_saved_as_they_are(tmp_path):
    model = whole("qwen2", torch.float32)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    install(model)
    records = write_tensors(tmp_path, dict(model.named_parameters()), 2**30)
    found = read_tensors(tmp_path, "cpu")
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], before[name]) for name in before)
    size = sum(parameter.nbytes for parameter in before.values())
    written = sum(record.size for name, record in records.items() if name.endswith("safetensors"))
    assert written < size + 8192, "rows that are left free below the weights are not written"


# ---------------------------------------------------------------------- head and last layer


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
@pytest.mark.parametrize("index", [[3, 4, 10, 40, 41, 60], [5, 5, 9], list(range(60))], ids=len)
@pytest.mark.parametrize("policy", ["keep", "offload_attention", "recompute"])
def test_head_and_embeddings_train_with_the_layers(policy, index, tied):
    """Rows that nothing reads, rows with two targets, and a table that is embedding and head at once."""
    model = tiny_llama(dtype=torch.float64, tie_word_embeddings=tied)
    stock = loss_and_gradients(model, _batch(index))
    installed = install(model, policy=policy)
    ours = loss_and_gradients(model, _batch(index))
    assert installed.fallbacks == {}
    assert float(ours[0]) == pytest.approx(float(stock[0]), rel=1e-6)
    assert ("lm_head.weight" in stock[1]) != tied
    assert worst(ours, stock)[0] < 1e-5


def test_a_tied_table_has_both_its_gradients():
    """Plain float64 autograd over whole logits, in which both uses of the table are counted."""
    model = tiny_llama(dtype=torch.float64)
    batch = _batch([3, 4, 10, 40])
    with packed_attention(model, "sdpa"):
        logits = model(
            input_ids=batch.ids_T[None], position_ids=batch.position_ids_T[None], use_cache=False,
            **document_kwargs(batch),
        ).logits[0, batch.logit_index_S]  # fmt: skip
    losses = torch.nn.functional.cross_entropy(logits, batch.targets_S, reduction="none")
    (losses * batch.weights_S).sum().backward()
    exact = model.model.embed_tokens.weight.grad.clone()
    model.zero_grad(set_to_none=True)
    install(model)
    ours = loss_and_gradients(model, batch)[1]["model.embed_tokens.weight"]
    assert float((ours - exact).norm() / exact.norm()) < 1e-6


# ---------------------------------------------------------------------- types


def squared_error(outcome: Outcome, exact: Outcome) -> float:
    parts = torch.stack([(outcome[1][name].double() - exact[1][name]).norm() for name in exact[1]])
    return float(parts.norm() / torch.stack([grad.norm() for grad in exact[1].values()]).norm()) ** 2


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "starcoder2"])
def test_float32_weights_under_autocast(family):
    """Master weights in float32, computed in bfloat16: gradients are float32, and about as exact as stock layers'.

    The stream is rounded between layers, which stock layers leave in float32 here.
    """
    ours = stock = 0.0
    for seed in range(4):
        model = tiny(family, CASES[family][0], torch.float32, adapter=False, seed=seed)
        exact = computed(copy.deepcopy(model).double(), packed_row())
        with torch.autocast("cpu", torch.bfloat16):
            outcomes = fused(model, packed_row()), computed(model, packed_row())
        assert {grad.dtype for grad in outcomes[0][1].values()} == {torch.float32}
        ours, stock = (
            total + squared_error(outcome, exact)
            for total, outcome in zip((ours, stock), outcomes, strict=True)
        )
    assert ours <= 1.5 * stock


def test_float32_weights_are_computed_in_the_type_of_autocast():
    """The embeddings leave a float32 stream, in which GEMMs would take several times as long."""
    layer = install(whole(dtype=torch.float32)).layers[0]
    hidden, tables = torch.randn(1, 6, 32, requires_grad=True), (torch.ones(1, 6, 12), torch.zeros(1, 6, 12))
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(hidden, position_embeddings=tables)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert hidden.grad.dtype == torch.float32
    assert layer(hidden, position_embeddings=tables).dtype == torch.float32


def test_float32_weights_keep_what_16_bits_would_round():
    """∂W of a weight held in float32 leaves its GEMM in float32."""
    model = whole(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        _, grads = fused(model, packed_row())
    grad = grads["model.layers.0.mlp.down_proj.weight"]
    assert not torch.equal(grad, grad.bfloat16().float())


# ---------------------------------------------------------------------- dropout


@pytest.mark.parametrize("family", ["llama", "cohere", "starcoder2"])
def test_gradients_beside_dropout_are_the_derivative(family):
    """Central differences in float64 through one layer whose adapters have dropout and whose weights train."""
    model = tiny(family, CASES[family][0], torch.float64, dropout=0.4).train()
    model.requires_grad_(True)
    layer = install(model).layers[0]
    hidden = torch.randn(1, 22, 32, dtype=torch.float64)
    angle = torch.randn(1, 22, layer.self_attn.head_dim // 2, dtype=torch.float64)
    angle = angle.repeat_interleave(2, -1) if family == "cohere" else angle.repeat(1, 1, 2)
    trained = list(layer.parameters())
    directions = [torch.randn_like(parameter) for parameter in trained]

    def loss(shift: float) -> torch.Tensor:
        with torch.no_grad():
            torch._foreach_add_(trained, directions, alpha=shift)
        torch.manual_seed(7)
        value = layer(hidden, position_embeddings=(angle.cos(), angle.sin())).square().sum()
        with torch.no_grad():
            torch._foreach_add_(trained, directions, alpha=-shift)
        return value

    loss(0.0).backward()
    slope = sum(
        float((parameter.grad * direction).sum())
        for parameter, direction in zip(trained, directions, strict=True)
    )
    with torch.no_grad():
        measured = float(loss(1e-6) - loss(-1e-6)) / 2e-6
    assert measured == pytest.approx(slope, rel=1e-6)
