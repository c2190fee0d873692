"""The hand-written layer against stock transformers + PEFT: outputs, every gradient, every policy and PEFT state."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.support.documents import random_corpus
from tests.support.four_bits import in_nf4
from tests.support.tiny import tiny_llama
from tunesmith.data.batches import collate
from tunesmith.models.adapter import add_lora
from tunesmith.models.attention import document_kwargs, packed_attention
from tunesmith.models.install import install
from tunesmith.models.policy import POLICIES
from tunesmith.models.projections import NotFusableError

LENGTHS = [7, 1, 19, 2, 30, 1]

# Stock norms and RoPE tables are float32 whatever the model is, hence not 1e-12 in float64.
TOLERANCE = {torch.float64: 2e-6, torch.float32: 5e-6}


def adapted(dtype=torch.float64, *, layers=2, dropout=0.0, targets="all-linear", device="cpu", **changes):
    """A tiny Llama with a LoRA adapter whose B is not zero."""
    model = tiny_llama(num_hidden_layers=layers, **changes)
    model = add_lora(model, rank=3, alpha=6.0, dropout=dropout, targets=targets, seed=1)
    fill(model)
    return model.to(dtype).to(device)


def fill(model) -> None:
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)


def run(model, batch=None, *, grad=True):
    """Final hidden states of a packed row, and the gradients of a fixed linear function of them."""
    batch = batch or collate(random_corpus(LENGTHS), range(len(LENGTHS)))
    batch = batch.to(next(model.parameters()).device)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    dtype = next(p for p in model.parameters() if p.is_floating_point()).dtype
    weights = torch.randn(batch.tokens, base.config.hidden_size, generator=torch.Generator().manual_seed(3))
    with packed_attention(base, "sdpa"):
        hidden = base.get_decoder()(
            input_ids=batch.ids_T[None],
            position_ids=batch.position_ids_T[None],
            use_cache=False,
            **document_kwargs(batch),
        ).last_hidden_state[0]
        if not grad:
            return hidden.detach(), {}
        (hidden * weights.to(hidden)).sum().backward()
    grads = {n: p.grad.to(dtype).clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return hidden.detach(), grads


def error(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    assert ours
    return max(float((ours[n] - theirs[n]).norm() / theirs[n].norm().clamp_min(1e-30)) for n in ours)


def check_equal(model, tolerance: float, *, fused: int | None = None, policy: str = "keep"):
    """Fused equals stock on the model as it is now; the model is left stock again."""
    hidden, grads = run(model)
    installed = install(model, policy=policy)
    ours, our_grads = run(model)
    if fused is not None:
        assert len(installed.fused) == fused
    fallbacks = dict(installed.fallbacks)
    installed.undo()
    assert (ours - hidden).norm() / hidden.norm() < tolerance
    if grads:
        assert error(our_grads, grads) < tolerance
    assert torch.equal(run(model)[0], hidden), "undo restores the stock computation"
    return fallbacks


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("layers", [2, 4, 12])
def test_every_policy_equals_stock(dtype, policy, layers):
    if layers == 12 and not POLICIES[policy].offload:
        pytest.skip("deep stacks are for what travels to the host and back")
    assert check_equal(adapted(dtype, layers=layers), TOLERANCE[dtype], fused=layers, policy=policy) == {}


def test_policies_agree_bit_for_bit():
    model = adapted(torch.float32)
    results = {}
    for policy in POLICIES:
        installed = install(model, policy=policy)
        results[policy] = run(model)
        installed.undo()
    hidden, grads = results["keep"]
    for policy, (other, other_grads) in results.items():
        assert torch.equal(other, hidden), policy
        assert all(torch.equal(other_grads[n], grads[n]) for n in grads), policy


@pytest.mark.parametrize(
    "targets",
    [["q_proj"], ["v_proj", "down_proj"], ["gate_proj"], ["o_proj", "up_proj"], ["k_proj", "gate_proj"]],
)
def test_adapters_on_some_projections(targets):
    check_equal(adapted(targets=targets), 2e-6, fused=2)


def test_biases():
    model = tiny_llama(attention_bias=True, mlp_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    model = add_lora(model, rank=3, alpha=6.0, dropout=0.0, targets="all-linear", seed=1).double()
    fill(model)
    for policy in ("keep", "recompute"):
        check_equal(model.double(), 2e-6, fused=2, policy=policy)


def test_two_adapters_switched_disabled_merged_and_added_later():
    """One installation; the same is done to a model without."""
    from peft import LoraConfig

    models = adapted(), adapted()
    installed = install(models[0])

    def compare():
        ours, stock = (run(model) for model in models)
        assert (ours[0] - stock[0]).norm() / stock[0].norm() < 2e-6
        assert ours[1].keys() == stock[1].keys()
        if stock[1]:
            assert error(ours[1], stock[1]) < 2e-6
        return stock[0]

    def activate(names):
        for model in models:
            model.base_model.set_adapter(names)

    first = compare()
    for model in models:
        model.add_adapter("second", LoraConfig(r=5, lora_alpha=3, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in models[0].named_parameters():
            if ".second." in name:
                models[1].get_parameter(name).copy_(parameter.normal_(std=0.1))
    for model in models:
        model.double()
    activate("second")
    second = compare()
    assert not torch.allclose(first, second)
    activate(["default", "second"])
    both = compare()
    assert not torch.allclose(both, second)
    with models[0].disable_adapter():
        plain, _ = run(models[0], grad=False)
    assert not torch.allclose(plain, both)
    activate("default")
    alone = compare()
    models[0].merge_adapter()
    merged, _ = run(models[0], grad=False)
    models[0].unmerge_adapter()
    assert (merged - alone).norm() / alone.norm() < 1e-5
    assert installed.fallbacks == {}


def test_an_adapter_that_is_no_plain_lora_runs_stock():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(r=3, target_modules="all-linear", use_dora=True)).double()
    installed = install(model)
    assert installed.fused == []
    assert "not plain LoRA" in installed.stock[0][1]


def test_unknown_architecture_says_why():
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "gpt_neox",
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=64,
    )
    installed = install(AutoModelForCausalLM.from_config(config))
    assert installed.table() == [
        (
            "1 decoder layers",
            "stock",
            "gpt_neox is not among the families with fused layers (docs/families.md)",
        )
    ]


def test_gradients_accumulate_and_are_not_written_behind_autograds_back():
    model = adapted()
    install(model)
    _, once = run(model)
    names = dict(model.named_parameters())
    for _ in range(2):
        base = model.get_base_model()
        batch = collate(random_corpus(LENGTHS), range(len(LENGTHS)))
        weights = torch.randn(batch.tokens, 32, generator=torch.Generator().manual_seed(3)).double()
        with packed_attention(base, "sdpa"):
            hidden = base.get_decoder()(
                input_ids=batch.ids_T[None], position_ids=batch.position_ids_T[None], use_cache=False,
                **document_kwargs(batch),
            ).last_hidden_state[0]  # fmt: skip
        trained = [p for p in names.values() if p.requires_grad]
        returned = torch.autograd.grad((hidden * weights).sum(), trained, retain_graph=False)
        assert all(p.grad is None for p in trained)
    assert (
        error(dict(zip([n for n, p in names.items() if p.requires_grad], returned, strict=True)), once) == 0.0
    )


def test_second_backward_through_the_same_graph_is_refused():
    model = adapted()
    install(model)
    ids = torch.arange(9)[None]
    loss = model(input_ids=ids, use_cache=False).logits.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="went backward a second time"):
        loss.backward()


def test_a_deep_copy_falls_back_to_its_own_weights():
    model = adapted(torch.float32)
    install(model)
    copied = copy.deepcopy(model)
    for parameter in copied.get_base_model().model.layers.parameters():
        parameter.data.zero_()
    ids = torch.arange(5, 14)[None]
    with torch.no_grad():
        cached = copied(input_ids=ids).logits  # with a cache: the stock path
        fused = copied(input_ids=ids, use_cache=False).logits
        original = model(input_ids=ids).logits
    assert torch.allclose(cached, fused, atol=1e-5)
    assert not torch.allclose(cached, original, atol=1e-2)


def test_checkpointing_reaches_the_layers_that_stay_stock():
    model = adapted(layers=3)
    layers = model.get_base_model().model.layers
    layers[1].__class__ = type("Other", (type(layers[1]),), {})  # not one of transformers
    hidden, grads = run(model)
    installed = install(model)
    assert installed.fused == ["layers.0", "layers.2"]
    model.gradient_checkpointing_enable()
    assert [layer.gradient_checkpointing for layer in layers] == [False, True, False]
    model.train()
    ours, our_grads = run(model)
    assert (ours - hidden).norm() / hidden.norm() < 2e-6
    assert error(our_grads, grads) < 2e-6


def test_adapters_with_dropout_of_their_own_run_stock():
    from peft import LoraConfig

    model = adapted(dropout=0.0)
    model.add_adapter("second", LoraConfig(r=2, lora_dropout=0.9, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    installed = install(model.double().train())
    assert installed.fused == []
    assert "dropout masks of their own" in installed.stock[0][1]
    model.eval()
    assert install(model).fused == ["layers.0", "layers.1"]


def test_foreign_packing_is_left_to_the_stock_layer():
    model = adapted(torch.float32)
    installed = install(model)
    boundaries = torch.tensor([0, 4, 9], dtype=torch.int32)
    model.get_base_model().model(input_ids=torch.arange(9)[None], use_cache=False, cu_seq_lens_q=boundaries)
    assert installed.fallbacks["document boundaries without document_lengths"] == 2


@pytest.mark.parametrize("policy", ["keep", "recompute"])
def test_dropout_gradient_is_the_derivative(policy):
    """Central differences in float64 along a random direction, masks fixed by the seed."""
    model = adapted(dropout=0.4, layers=1).train()
    install(model, policy=policy)
    trained = [p for p in model.parameters() if p.requires_grad]
    directions = [torch.randn_like(p) for p in trained]

    layer = model.get_base_model().model.layers[0]  # alone: stock parts around it compute in float32
    hidden = torch.randn(1, 22, 32, dtype=torch.float64)
    angle = torch.randn(1, 22, 4, dtype=torch.float64).repeat(1, 1, 2)

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
    slope = sum(float((p.grad * d).sum()) for p, d in zip(trained, directions, strict=True))
    step = 1e-6
    with torch.no_grad():
        measured = float(loss(step) - loss(-step)) / (2 * step)
    assert measured == pytest.approx(slope, rel=1e-6)
    model.eval()
    assert torch.equal(loss(0.0), loss(0.0))
    assert not torch.equal(loss(0.0), value), "dropout is off in evaluation"


def test_dropout_keeps_its_rate_and_its_mean():
    from tunesmith.models.adapter_math import adapter_input
    from tunesmith.models.projections import Group, build_operands, read_projection

    model = adapted(dropout=0.25, targets=["o_proj"]).train()
    module = model.get_base_model().model.layers[0].self_attn.o_proj
    group = Group((read_projection(module),))
    (operands,) = build_operands([group], torch.float64)
    x = torch.eye(32, dtype=torch.float64).repeat(2000, 1)  # each row shows which input survived
    u = adapter_input(x, group, operands, seed=11)
    expected = x @ operands.a_QK.T
    kept = (u.norm(dim=1) > 0).double().mean()
    assert kept == pytest.approx(0.75, abs=0.01)
    assert float((u.mean(0) - expected.mean(0)).norm() / expected.mean(0).norm()) < 0.05
    model.eval()
    assert torch.equal(adapter_input(x, Group((read_projection(module),)), operands, seed=11), expected)


def test_generation_with_a_cache_takes_the_stock_path():
    model = adapted(torch.float32).eval()
    prompt = torch.tensor([[5, 6, 7, 8]])
    expected = model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False)
    installed = install(model)
    assert torch.equal(model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False), expected)
    assert installed.fallbacks["a KV cache"] > 0


def test_dense_batches_are_rows_of_documents():
    model = adapted()
    ids = torch.randint(3, 300, (3, 11), generator=torch.Generator().manual_seed(0))
    stock = model(input_ids=ids, use_cache=False).logits
    install(model)
    ours = model(input_ids=ids, use_cache=False).logits
    assert (ours - stock).norm() / stock.norm() < 2e-6


def test_gradient_checkpointing_becomes_a_policy():
    model = adapted()
    installed = install(model)
    model.gradient_checkpointing_enable()
    assert installed.policy.name == "recompute"
    model.gradient_checkpointing_disable()
    assert installed.policy.name == "keep"
    installed.undo()
    assert "gradient_checkpointing_enable" not in vars(model.get_base_model())


def test_joined_weights_keep_names_shapes_values_and_save(tmp_path):
    from safetensors.torch import load_file

    model = adapted(torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    install(model)
    attention = model.get_base_model().model.layers[0].self_attn
    q, k = attention.q_proj.base_layer.weight, attention.k_proj.base_layer.weight
    assert k.data_ptr() == q.data_ptr() + q.numel() * q.element_size()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    model.get_base_model().save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.base_layer.weight"
    assert torch.equal(saved[name], k)


@pytest.mark.parametrize("size", [1e-6])
def test_a_tiny_adapter_changes_the_output_by_its_exact_effect(size):
    """In float32 the effect is of the size of an ulp or two, so its projection on the exact one is compared."""
    exact = adapted(torch.float64, layers=1)
    for name, parameter in exact.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(size / 0.1)

    def effect(model) -> torch.Tensor:
        installed = install(model)
        batch = collate(random_corpus([200] * 8), range(8))
        on, _ = run(model, batch, grad=False)
        with model.disable_adapter():
            off, _ = run(model, batch, grad=False)
        installed.undo()
        return (on - off).double()

    want = effect(exact)
    got = effect(exact.float())
    assert float((got * want).sum() / want.square().sum()) == pytest.approx(1.0, abs=0.01)


def test_qlora_layers_equal_the_stock_4bit_layers():
    base = in_nf4(tiny_llama(hidden_size=64, intermediate_size=128))
    model = add_lora(base, rank=3, alpha=6.0, dropout=0.0, targets="all-linear", seed=1)
    fill(model)
    for policy in ("keep", "recompute"):
        check_equal(model, 2e-5, fused=2, policy=policy)


def test_what_is_not_fusable_is_named():
    from tunesmith.models.projections import read_projection

    with pytest.raises(NotFusableError, match="LayerNorm"):
        read_projection(torch.nn.LayerNorm(3))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("layers", [2, 4, 12])
def test_on_the_gpu_errors_are_no_larger_than_plain_autograds(dtype, policy, layers):
    """Gradient error against float64, fused beside stock PEFT under autocast, at head size 64 and odd lengths."""
    shape = {"hidden_size": 256, "intermediate_size": 640, "num_attention_heads": 4, "num_key_value_heads": 2}
    lengths = [130, 1, 257, 64, 3, 57]
    corpus = random_corpus(lengths)
    batch = collate(corpus, range(len(lengths)))
    torch.backends.cuda.matmul.allow_tf32 = False
    exact_model = adapted(torch.float64, layers=layers, device="cuda", **shape)
    _, exact = run(exact_model, batch)
    model = adapted(torch.float32, layers=layers, device="cuda", **shape)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        _, stock = run(model, batch)
        installed = install(model, policy=policy)
        _, ours = run(model, batch)
    assert installed.fallbacks == {}

    def total(grads):
        difference = torch.stack([(grads[n].double() - exact[n]).norm() for n in exact]).norm()
        return float(difference / torch.stack([exact[n].norm() for n in exact]).norm())

    assert total(ours) <= 1.1 * total(stock) + 1e-6
