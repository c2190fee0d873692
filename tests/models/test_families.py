"""Every family of `ARCHITECTURES` against transformers: logits and all gradients, of adapters and of the weights
themselves, on packed rows and on plain batches, under every policy; and what a row refuses.

Models are tiny and random, made by transformers from its own config classes. Norm weights and biases are random too:
at their initial ones and zeros a layer could leave them out unseen.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.documents import random_corpus
from tunesmith.data.batches import collate
from tunesmith.kernels.canary import Traits
from tunesmith.kernels.packed import Documents
from tunesmith.models.adapter import add_lora
from tunesmith.models.attention import document_kwargs, packed_attention
from tunesmith.models.install import install
from tunesmith.models.kernel_shape import kernel_shape
from tunesmith.models.policy import POLICIES
from tunesmith.models.projections import Group, read_projection
from tunesmith.planning.architectures import ARCHITECTURES, find_architecture

LENGTHS = [7, 1, 19, 2, 30, 1]
WINDOW = 5

TINY: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MIXED: dict[str, Any] = {
    "num_hidden_layers": 3,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
PARTIAL: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}

CASES: dict[str, tuple[dict[str, Any], ...]] = {
    "llama": ({}, {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    "mistral": ({"sliding_window": None}, {"sliding_window": WINDOW}),
    "qwen2": ({}, {"use_sliding_window": True, **MIXED}),
    "qwen3": ({}, {"use_sliding_window": True, "attention_bias": True, **MIXED}),
    "gemma2": (
        {**MIXED, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        {"attn_logit_softcapping": None, "attention_bias": True},
    ),
    "gemma3_text": ({**MIXED, "query_pre_attn_scalar": 20}, {"num_key_value_heads": 1}),
    "phi3": (
        {"head_dim": 8, "sliding_window": None},
        {"head_dim": 8, "sliding_window": WINDOW, "partial_rotary_factor": 0.75},
    ),
    "gemma": ({}, {"num_key_value_heads": 1}),
    "ministral": (MIXED, {"sliding_window": WINDOW, "layer_types": ["full_attention"] * 2}),
    "granite": (
        {"attention_multiplier": 0.3, "residual_multiplier": 0.22, "embedding_multiplier": 3.0},
        {"attention_bias": True, "mlp_bias": True, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    ),
    "olmo2": ({"head_dim": 8}, {"head_dim": 8, "attention_bias": True, "num_key_value_heads": 4}),
    "olmo3": ({"head_dim": 8, **MIXED},),
    "smollm3": (
        {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]},
        {"use_sliding_window": True, "sliding_window": WINDOW, "no_rope_layers": [1, 0], "mlp_bias": True},
    ),
    "cohere": ({"head_dim": 8, "logit_scale": 0.5}, {"head_dim": 8, "attention_bias": True}),
    "cohere2": (MIXED, {"logit_scale": 0.5}),
    "glm4": ({"attention_bias": True, "partial_rotary_factor": 0.5}, {"partial_rotary_factor": 1.0}),
    "glm": ({"attention_bias": True, "partial_rotary_factor": 0.5},),
    "starcoder2": (
        {"sliding_window": None, "residual_dropout": 0.0, "embedding_dropout": 0.0},
        {"sliding_window": WINDOW, "residual_dropout": 0.0, "embedding_dropout": 0.0, "use_bias": False},
    ),
}
"""Configs of a family that differ in what its layer computes."""

FAMILIES = [
    pytest.param(name, case, id=f"{name}-{n}") for name, c in CASES.items() for n, case in enumerate(c)
]

# Stock norms and RoPE tables are float32 whatever the model is, hence not 1e-12 in float64.
TOLERANCE = {torch.float64: 3e-6, torch.float32: 1e-5}

Outcome = tuple[torch.Tensor, dict[str, torch.Tensor]]


def tiny(
    model_type: str,
    changes: dict[str, Any],
    dtype: torch.dtype,
    *,
    adapter: bool = True,
    seed: int = 0,
    **lora: Any,
) -> Any:
    """A random model of a family in evaluation mode, with an adapter on every linear layer whose B is not zero.

    Without the adapter all of it trains.
    """
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **TINY | changes)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
        elif name.endswith("bias"):
            parameter.data.normal_(std=0.3)
        elif "embed" not in name and "lm_head" not in name:  # so that blocks write as much as there is
            parameter.data.normal_(std=parameter.shape[1] ** -0.5)
    if adapter:
        options = {"rank": 3, "alpha": 6.0, "dropout": 0.0, "targets": "all-linear", "seed": 1} | lora
        model = add_lora(model, **options)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
    return model.to(dtype)


def packed_row() -> dict[str, Any]:
    """Documents of odd lengths in one row, two of them one token long."""
    batch = collate(random_corpus(LENGTHS), range(len(LENGTHS)))
    return {
        "input_ids": batch.ids_T[None],
        "position_ids": batch.position_ids_T[None],
        **document_kwargs(batch),
    }


def plain_batch() -> dict[str, Any]:
    return {"input_ids": torch.randint(3, 384, (3, 17), generator=torch.Generator().manual_seed(0))}


BATCHES = {"packed": packed_row, "plain": plain_batch}


def base_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def computed(model: Any, batch: dict[str, Any]) -> Outcome:
    """Logits, and the gradients of a fixed linear function of them."""
    base = base_of(model)
    with packed_attention(base, "sdpa"):
        logits = base(**batch, use_cache=False).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    (logits * weights.to(logits)).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return logits.detach(), grads


def fused(model: Any, batch: dict[str, Any], policy: str = "keep") -> Outcome:
    """The same with every layer fused; the model is left stock."""
    installed = install(model, policy=policy)
    assert installed.stock == []
    outcome = computed(model, batch)
    assert installed.fallbacks == {}
    installed.undo()
    return outcome


def worst(ours: Outcome, stock: Outcome) -> tuple[float, str]:
    """The largest relative error among logits and gradients, and whose it is."""
    assert ours[1].keys() == stock[1].keys()
    assert stock[1]
    pairs = {"logits": (ours[0], stock[0])} | {name: (ours[1][name], stock[1][name]) for name in stock[1]}
    return max((float((a - b).norm() / b.norm()), name) for name, (a, b) in pairs.items())


def test_every_row_has_its_cases():
    assert CASES.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("mode", ["adapter", "full"])
@pytest.mark.parametrize(("family", "changes"), FAMILIES)
def test_parity_with_transformers(family, changes, mode, batch, dtype):
    """Ranks of 8 go into the GEMMs of their weights, ranks of 3 do not; with `full` every parameter trains."""
    model = tiny(family, changes, dtype, adapter=mode == "adapter", rank=8 if batch == "packed" else 3)
    stock = computed(model, BATCHES[batch]())
    ours = fused(model, BATCHES[batch]())
    error, name = worst(ours, stock)
    # gradients of the weights of norms on q and k cancel, and stock norms are float32
    tolerance = TOLERANCE[dtype] if mode == "adapter" else 3 * TOLERANCE[dtype]
    if error >= tolerance and dtype == torch.float32:
        # gradients that cancel: ours err about as stock's, whose single worst one depends on the order of its sums
        exact = computed(copy.deepcopy(model).double(), BATCHES[batch]())
        assert worst(ours, exact)[0] < 2.5 * worst(stock, exact)[0], name
    else:
        assert error < tolerance, name


@pytest.mark.parametrize("group", ["qkv", "output", "gate_up", "down"])
@pytest.mark.parametrize(
    "family", ["gemma3_text", "phi3", "olmo2", "cohere2", "starcoder2", "granite", "glm4"]
)
def test_adapters_on_one_group_alone(family, group):
    paths = getattr(ARCHITECTURES[family], group)
    targets = [path.rpartition(".")[2] for path in ([paths] if isinstance(paths, str) else paths)]
    model = tiny(family, CASES[family][0], torch.float64, rank=8, targets=targets)
    stock = computed(model, packed_row())
    for policy in ("keep_all", "recompute"):
        error, name = worst(fused(model, packed_row(), policy), stock)
        assert error < TOLERANCE[torch.float64], name


@pytest.mark.parametrize("mode", ["adapter", "full"])
@pytest.mark.parametrize(("family", "changes"), FAMILIES)
def test_policies_agree_bit_for_bit(family, changes, mode):
    model = tiny(family, changes, torch.float32, adapter=mode == "adapter", rank=8)
    logits, grads = fused(model, packed_row())
    for policy in POLICIES:
        other, other_grads = fused(model, packed_row(), policy)
        assert torch.equal(other, logits), policy
        assert [name for name in grads if not torch.equal(other_grads[name], grads[name])] == [], policy


# ---------------------------------------------------------------------- 16 bits


def check_errors(
    family: str, changes: dict[str, Any], dtype: torch.dtype, device: str, *, adapter: bool = True
) -> None:
    """Over several models the layer errs no more against float64 than stock layers under autocast do.

    Without an adapter the weights themselves train, in the type.
    """
    ours, stock = 0.0, 0.0
    row = {key: value.to(device) if torch.is_tensor(value) else value for key, value in packed_row().items()}
    row["packed_documents"] = Documents(row["document_lengths"], row["cu_seq_lens_q"], max(LENGTHS))
    for seed in range(3):
        model = tiny(family, changes, torch.float32, adapter=adapter, rank=8, seed=seed).to(device)
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                parameter.data = parameter.data.to(dtype)
        exact = computed(copy.deepcopy(model).double(), row)
        with torch.autocast(device, dtype):
            outcomes = fused(model, row), computed(model, row)
        ours, stock = (
            total + squared_error(outcome, exact)
            for total, outcome in zip((ours, stock), outcomes, strict=True)
        )
    assert ours <= 1.2 * stock  # chance alone moves sums of three by some percent


def squared_error(outcome: Outcome, exact: Outcome) -> float:
    """That of all gradients as one vector, relative."""
    parts = torch.stack([(outcome[1][n].double() - exact[1][n]).norm() for n in exact[1]])
    return float(parts.norm() / torch.stack([g.norm() for g in exact[1].values()]).norm()) ** 2


@pytest.mark.parametrize("mode", ["adapter", "full"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_errors_are_no_larger_than_plain_autograds(family, dtype, mode):
    check_errors(family, CASES[family][0], dtype, "cpu", adapter=mode == "adapter")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["adapter", "full"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("family", "changes"), FAMILIES)
def test_errors_on_the_gpu_are_no_larger_than_plain_autograds(family, changes, dtype, mode):
    shape = {"hidden_size": 256, "intermediate_size": 640, "head_dim": 64}
    check_errors(family, changes | shape, dtype, "cuda", adapter=mode == "adapter")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["adapter", "full"])
@pytest.mark.parametrize(("family", "changes"), FAMILIES)
def test_parity_in_float32_on_the_gpu(family, changes, mode):
    torch.backends.cuda.matmul.allow_tf32 = False
    model = tiny(family, changes, torch.float32, adapter=mode == "adapter", rank=8).to("cuda")
    row = {key: value.to("cuda") if torch.is_tensor(value) else value for key, value in packed_row().items()}
    row["packed_documents"] = Documents(row["document_lengths"], row["cu_seq_lens_q"], max(LENGTHS))
    exact = computed(copy.deepcopy(model).double(), row)
    stock = computed(model, row)
    assert worst(fused(model, row), exact)[0] < max(2e-5, 1.5 * worst(stock, exact)[0])


# ---------------------------------------------------------------------- entries of a row


CONSTANTS = (
    "gated",
    "norm_offset",
    "parallel",
    "qk_norms",
    "qk_full",
    "interleaved",
    "paired_tables",
    "rope",
    "window",
    "softcap",
    "residual_multiplier",
)
ENTRIES = [
    (name, constant)
    for name, row in ARCHITECTURES.items()
    for constant in CONSTANTS
    if getattr(row, constant) != type(row).__dataclass_fields__[constant].default
]


@pytest.mark.parametrize(("family", "constant"), ENTRIES)
def test_a_row_without_one_of_its_entries_is_seen_to_be_wrong(family, constant, monkeypatch):
    """What the parity test would say of a row that forgets something: a family's cases reach all of its row."""
    row = ARCHITECTURES[family]
    default = type(row).__dataclass_fields__[constant].default
    monkeypatch.setitem(ARCHITECTURES, family, replace(row, **{constant: default}))
    errors = []
    for changes in CASES[family]:
        model = tiny(family, changes, torch.float64)
        stock = computed(model, packed_row())
        try:
            errors.append(worst(fused(model, packed_row()), stock)[0])
        except (RuntimeError, AssertionError):  # not even the shapes fit
            errors.append(1.0)
    assert max(errors) > 1e-3


@pytest.mark.parametrize("mode", ["adapter", "full"])
@pytest.mark.parametrize("policy", ["keep", "recompute"])
@pytest.mark.parametrize("family", ["gemma3_text", "phi3", "olmo3", "cohere2", "starcoder2", "granite"])
def test_the_last_layer_computes_what_is_read(family, policy, mode):
    model = tiny(family, CASES[family][0], torch.float64, adapter=mode == "adapter")
    backbone = base_of(model).get_decoder()
    rows_S = torch.tensor([3, 4, 10, 40, 40, 59])

    def outcome(wanted: dict[str, Any]) -> Outcome:
        with packed_attention(base_of(model), "sdpa"):
            hidden = backbone(**packed_row(), use_cache=False, **wanted).last_hidden_state[0]
        hidden = hidden if hidden.shape[0] == len(rows_S) else hidden[rows_S]
        (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return hidden.detach(), grads

    stock = outcome({})
    installed = install(model, policy=policy)
    assert worst(outcome({"wanted_rows": rows_S}), stock)[0] < TOLERANCE[torch.float64]
    assert installed.fallbacks == {}


@pytest.mark.parametrize("policy", ["keep", "recompute"])
@pytest.mark.parametrize("family", ["gemma2", "phi3", "olmo2", "cohere", "starcoder2", "glm4"])
def test_dropout_gradient_is_the_derivative(family, policy):
    """Central differences in float64 along a random direction, masks fixed by the seed, through one layer alone."""
    model = tiny(family, CASES[family][0], torch.float64, dropout=0.4).train()
    installed = install(model, policy=policy)
    trained = [p for p in model.parameters() if p.requires_grad]
    directions = [torch.randn_like(p) for p in trained]
    layer = installed.layers[0]
    hidden = torch.randn(1, 22, 32, dtype=torch.float64)
    head_dim = layer.self_attn.head_dim
    rotated = int(head_dim * CASES[family][0].get("partial_rotary_factor", 1.0))
    angle = torch.randn(1, 22, rotated // 2, dtype=torch.float64)
    angle = angle.repeat_interleave(2, -1) if ARCHITECTURES[family].paired_tables else angle.repeat(1, 1, 2)

    def loss(shift: float) -> torch.Tensor:
        with torch.no_grad():
            for p, d in zip(trained, directions, strict=True):
                p.add_(d, alpha=shift)
        torch.manual_seed(7)
        value = layer(hidden, position_embeddings=(angle.cos(), angle.sin())).square().sum()
        with torch.no_grad():
            for p, d in zip(trained, directions, strict=True):
                p.sub_(d, alpha=shift)
        return value

    value = loss(0.0)
    value.backward()
    slope = sum(
        float((p.grad * d).sum()) for p, d in zip(trained, directions, strict=True) if p.grad is not None
    )
    with torch.no_grad():
        measured = float(loss(1e-6) - loss(-1e-6)) / 2e-6
    assert installed.fallbacks == {}
    assert measured == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("family", ["gemma3_text", "phi3", "glm4"])
def test_4bit_weights(family):
    """Dequantised into buffers with room for the adapters, one matrix that holds several projections too."""
    import bitsandbytes as bnb

    shape = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    model = tiny(family, CASES[family][0] | shape, torch.float32, adapter=False)
    for parent in list(model.model.layers.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear):
                held = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, bias=child.bias is not None, quant_type="nf4",
                    compute_dtype=torch.float32,
                )  # fmt: skip
                held.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4").to(
                    "cpu"
                )
                held.bias = child.bias
                held.support_avx512bf16_for_cpu = False
                setattr(parent, name, held)
    model.requires_grad_(False)
    model = add_lora(model, rank=8, alpha=16.0, dropout=0.0, targets="all-linear", seed=1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    stock = computed(model, packed_row())
    for policy in ("keep", "recompute"):
        assert worst(fused(model, packed_row(), policy), stock)[0] < 3e-5


def test_one_matrix_for_q_k_and_v_has_room_for_its_adapter_too():
    model = tiny("phi3", CASES["phi3"][0], torch.float32, rank=8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    installed = install(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    for path in ("self_attn.qkv_proj", "mlp.gate_up_proj"):
        group = Group((read_projection(installed.layers[0].get_submodule(path)),))
        assert group.weight(torch.float32, below=group.foldable).shape[0] == group.columns + 8


TRAITS = {
    "llama": Traits(),
    "gemma2": Traits(norm_offset=1.0, behind=True, activation="gelu_tanh"),
    "qwen3": Traits(qk_norm=True),
    "olmo3": Traits(before=False, behind=True, qk_norm=True, qk_full=True),
    "phi3": Traits(one_qkv=True, one_gate_up=True, rotary_dim=6),
    "cohere2": Traits(norm="layer", interleaved=True, spread=True),
    "glm4": Traits(behind=True, one_gate_up=True, interleaved=True, rotary_dim=6),
    "starcoder2": Traits(norm="layer", norm_bias=True, activation="gelu_tanh", gated=False),
    "granite": Traits(residual_multiplier=0.22),
}


@pytest.mark.parametrize("family", TRAITS)
def test_the_canary_is_told_what_a_family_asks_of_the_kernels(family):
    case = 1 if family == "phi3" else 0
    installed = install(tiny(family, CASES[family][case], torch.float32))
    shape = kernel_shape(installed, rank=8, nf4=False)
    assert shape.traits == TRAITS[family]
    windows = {scores.window for scores in shape.scores}
    assert windows == (
        {WINDOW, None} if family in ("gemma2", "olmo3", "cohere2") else {shape.scores[0].window}
    )


@pytest.mark.parametrize("norm", ["q_norm", "input_layernorm", None])
def test_the_canary_is_told_whether_norms_train(norm):
    model = tiny("qwen3", {}, torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(
            "lora_" in name or f"layers.1.self_attn.{norm}" in name or f"layers.1.{norm}" in name
        )
    assert kernel_shape(install(model), rank=3, nf4=False).traits.norms_train == (norm is not None)


# ---------------------------------------------------------------------- what is refused


REFUSED = [
    ("llama", {"attention_dropout": 0.1}, "drops attention weights"),
    ("llama", {"hidden_act": "relu"}, "activation relu is not among"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "both directions"),
    ("phi3", {"resid_pdrop": 0.1}, "drops what a block adds"),
    ("starcoder2", {"residual_dropout": 0.1}, "drops what a block adds"),
    ("cohere", {"use_qk_norm": True}, "layer norms on q and k"),
    ("qwen2_moe", {}, "not among the families"),
]


@pytest.mark.parametrize(("model_type", "changes", "reason"), REFUSED)
def test_what_the_layer_does_not_compute_is_refused_with_its_reason(model_type, changes, reason):
    row, said = find_architecture(AutoConfig.for_model(model_type, **TINY | changes))
    assert row is None
    assert reason in said


@pytest.mark.parametrize(("family", "changes"), FAMILIES)
def test_with_the_stock_attention_a_batch_is_right_as_well(family, changes):
    """Fused where the stock backbone makes no mask; with one, as a window needs it, on the stock layer."""
    model = tiny(family, changes, torch.float64)
    base = model.get_base_model()
    ids = plain_batch()["input_ids"]
    padded = torch.ones_like(ids)
    padded[0, -4:] = 0
    for mask in (None, torch.ones_like(ids), padded):
        stock = base(input_ids=ids, attention_mask=mask, use_cache=False).logits.detach()
        installed = install(model)
        ours = base(input_ids=ids, attention_mask=mask, use_cache=False).logits.detach()
        masked = installed.fallbacks["a ready-made attention mask"]
        layers, windows = len(installed.fused), [shape.scores.window for shape in installed.shapes]
        installed.undo()
        assert float((ours - stock).norm() / stock.norm()) < TOLERANCE[torch.float64]
        always = mask is padded or base.config._attn_implementation == "eager"  # Gemma 2, for its soft cap
        hiding = [window for window in windows if window is not None and window < ids.shape[1]]
        assert masked == (layers if always else len(hiding))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "ministral"])
def test_position_ids_that_restart_are_left_to_the_stock_layers(family):
    """Without boundaries beside them: the stock backbone makes a mask of documents out of them."""
    model = tiny(family, CASES[family][0], torch.float64)
    base = model.get_base_model()
    row = {key: packed_row()[key] for key in ("input_ids", "position_ids")}
    stock = base(**row, use_cache=False).logits.detach()
    installed = install(model)
    # the norm behind the layers is ours still, and transformers' rounds to float32
    ours = base(**row, use_cache=False).logits.detach()
    assert float((ours - stock).norm() / stock.norm()) < TOLERANCE[torch.float64]
    assert installed.fallbacks == {"a ready-made attention mask": len(installed.fused)}


def test_layers_that_are_not_transformers_own_are_left_alone():
    """Code that comes with a model may call itself llama and compute something else."""
    model = tiny("llama", {}, torch.float32)
    layers = model.get_base_model().model.layers
    layers[0].__class__ = type("Other", (type(layers[0]),), {})
    installed = install(model)
    assert installed.fused == ["layers.1"]
    assert installed.stock == [("layers.0", "its class Other is not one of transformers")]


def test_a_row_that_names_what_is_not_there_is_no_fused_layer(monkeypatch):
    row = replace(ARCHITECTURES["gemma2"], softcap="self_attn.renamed")
    monkeypatch.setitem(ARCHITECTURES, "gemma2", row)
    installed = install(tiny("gemma2", {}, torch.float32))
    assert installed.fused == []
    assert "renamed" in installed.stock[0][1]


def test_rows_that_flash_attention_splits_by_itself_run_stock():
    """It finds documents by their position ids, which only the device knows."""
    model = tiny("llama", {}, torch.float32)
    installed = install(model)
    layer = installed.layers[0]
    layer.self_attn.config._attn_implementation = "flash_attention_2"
    forward = vars(layer)["forward"]
    hidden = torch.randn(1, 6, 32)
    tables = (torch.ones(1, 6, 12), torch.zeros(1, 6, 12))
    with pytest.raises(Exception):  # noqa: B017, PT011 - there is no flash attention on a CPU
        forward(hidden, position_embeddings=tables)
    assert installed.fallbacks == {"a row that flash attention may split at its position ids": 1}
    forward(
        hidden,
        position_embeddings=tables,
        document_lengths=(4, 2),
        cu_seq_lens_q=torch.tensor([0, 4, 6]).int(),
    )
    forward(hidden.expand(2, 6, 32), position_embeddings=tables)
    assert installed.fallbacks.total() == 1
