"""The MLP in tiles of tokens: what an untiled layer computes, in memory for a tile."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models import test_families as families
from tests.models.test_decoder_truths import batch_of, computed, rounded
from tests.models.test_families import CASES, FAMILIES, TOLERANCE, packed_row, tiny, worst
from tests.models.test_wanted_rows import _batch, _model, _outcome
from tunesmith.models import layer_mlp, tiles
from tunesmith.models.install import install
from tunesmith.models.layer_weights import Gradients
from tunesmith.models.policy import POLICIES
from tunesmith.models.projections import Group
from tunesmith.models.tiles import TILE_TOKENS, tile_rows

TOKENS = 60
"""Of `packed_row`."""
TILED = [name for name, policy in POLICIES.items() if "gate_up" not in policy.keep]
SANDWICH, PARALLEL, UNGATED = "gemma2", "cohere2", "starcoder2"

# sums over tiles instead of one over all tokens: a few ulps of float64, in some gradients of weights that cancel
SUMS = 1e-11


def tiled(model: Any, batch: dict[str, Any], policy: str, tile: int | None) -> families.Outcome:
    """Logits and gradients with every layer fused; the model is left stock."""
    installed = install(model, policy=policy)
    assert installed.stock == []
    installed.tile_tokens = tile
    torch.manual_seed(0)
    outcome = families.computed(model, batch)
    assert installed.fallbacks == {}
    installed.undo()
    return outcome


# ---------------------------------------------------------------------- numbers


@pytest.mark.parametrize("mode", ["adapter", "full"])
@pytest.mark.parametrize(("family", "changes"), FAMILIES)
def test_families_in_tiles_equal_transformers(family, changes, mode):
    """Tiles of 17, 17, 17 and 9 tokens: documents cross their bounds."""
    model = tiny(family, changes, torch.float64, adapter=mode == "adapter", rank=8)
    stock = families.computed(model, packed_row())
    error, name = worst(tiled(model, packed_row(), "recompute", 17), stock)
    assert error < (1 if mode == "adapter" else 3) * TOLERANCE[torch.float64], name


@pytest.mark.parametrize("mode", ["adapter", "full"])
@pytest.mark.parametrize("policy", TILED)
@pytest.mark.parametrize("family", ["llama", SANDWICH, PARALLEL, UNGATED, "phi3"])
def test_tiles_change_nothing_but_the_order_of_sums(family, policy, mode):
    model = tiny(family, CASES[family][0], torch.float64, adapter=mode == "adapter", rank=8)
    whole = tiled(model, packed_row(), policy, None)
    for tile in (1, 7, 30, 59):
        error, name = worst(tiled(model, packed_row(), policy, tile), whole)
        assert error < SUMS, (tile, name)


@pytest.mark.parametrize("rank", [3, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", SANDWICH, UNGATED])
def test_in_16_bits_outputs_are_those_of_whole_rows_bit_for_bit(family, dtype, rank):
    """And gradients, which are rounded once, differ by less than a rounding."""
    model = tiny(family, CASES[family][0], torch.float32, rank=rank)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    with torch.autocast("cpu", dtype):
        whole = tiled(model, packed_row(), "recompute", None)
        parts = tiled(model, packed_row(), "recompute", 20)
    assert torch.equal(parts[0], whole[0])
    assert worst(parts, whole)[0] < torch.finfo(dtype).eps


@pytest.mark.parametrize("family", ["llama", SANDWICH])
def test_weights_in_16_bits_have_gradients_summed_in_float32(family, monkeypatch):
    """Of 60 tiles, each of which comes to the sum unrounded."""
    added, add = set(), Gradients.add

    def spied(self: Gradients, others: Gradients) -> None:
        added.update(
            grad.dtype for found in (others.own, others.norms) for gs in found.values() for grad in gs
        )
        add(self, others)

    monkeypatch.setattr(Gradients, "add", spied)
    model = tiny(family, CASES[family][0], torch.bfloat16, adapter=False)
    exact = families.computed(copy.deepcopy(model).double(), packed_row())
    errors = []
    for tile in (None, 1):
        outcome = tiled(model, packed_row(), "recompute", tile)
        assert {grad.dtype for grad in outcome[1].values()} == {torch.bfloat16}
        errors.append(families.squared_error(outcome, exact))
    assert added == {torch.float32}
    assert errors[1] < 1.05 * errors[0]


@pytest.mark.parametrize("policy", TILED)
def test_policies_agree_bit_for_bit_in_tiles(policy):
    for dropout in (0.0, 0.3):
        model = rounded(torch.bfloat16, rank=8, dropout=dropout).train(dropout > 0.0)
        outcomes = []
        for name in ("recompute", policy):
            installed = install(model, policy=name)
            installed.tile_tokens = 17
            torch.manual_seed(0)
            outcomes.append(computed(model, torch.bfloat16, batch_of()))
            installed.undo()
        (hidden, grads), (other, other_grads) = outcomes
        assert torch.equal(hidden, other)
        assert [name for name in grads if not torch.equal(other_grads[name], grads[name])] == []


@pytest.mark.parametrize("family", ["llama", SANDWICH, PARALLEL])
@pytest.mark.parametrize("group", [["gate_proj", "up_proj"], ["down_proj"]], ids=str)
def test_dropout_drops_the_same_in_backward(family, group):
    """Directional derivative in the adapters and the norms against finite differences, masks and all.

    Norms of stock transformers are float32, hence the wide step.
    """
    model = tiny(family, CASES[family][0], torch.float64, rank=4, dropout=0.5, targets=group).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "norm" in name)

    def loss() -> float:
        return float((tiled(model, packed_row(), "recompute", 7)[0] * weights).sum())

    logits, grads = tiled(model, packed_row(), "recompute", 7)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3)).double()
    along = {name: torch.randn_like(grad) for name, grad in grads.items()}
    slope = sum(float((grads[name] * along[name]).sum()) for name in grads)
    step, values = 1e-3, []
    for sign in (1, -1):
        shift(model, along, sign * step)
        values.append(loss())
        shift(model, along, -sign * step)
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=2e-3)
    untiled = tiled(model, packed_row(), "recompute", None)[0]
    assert not torch.allclose(untiled, logits), "tiles draw masks of their own"


def test_no_two_tiles_draw_the_same_masks_and_backward_draws_those_of_forward(monkeypatch):
    seeds = {"mlp_forward": [], "mlp_backward": []}
    for name, found in seeds.items():
        original = getattr(layer_mlp, name)
        monkeypatch.setattr(
            layer_mlp,
            name,
            lambda call, *rest, found=found, original=original: (
                found.append(call.seeds) or original(call, *rest)
            ),
        )
    model = tiny("llama", {"num_hidden_layers": 1}, torch.float32, rank=4, dropout=0.5).train()
    tiled(model, packed_row(), "recompute", 17)
    assert seeds["mlp_forward"] == seeds["mlp_backward"]
    # each projection of a group draws from a seed of its own
    drawn = [seed + number for call in seeds["mlp_forward"] for seed in call for number in range(3)]
    assert len(set(drawn)) == len(drawn) == 4 * 4 * 3


def shift(model: Any, along: dict[str, torch.Tensor], step: float) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, direction in along.items():
            parameters[name] += step * direction


@pytest.mark.parametrize("policy", TILED)
@pytest.mark.parametrize("index", [[3, 4, 10, 40, 41, 60], [5, 5, 9], list(range(30))], ids=len)
def test_wanted_rows_of_the_last_layer_are_tiled_where_they_are_many(index, policy):
    batch, model = _batch(index), _model()
    stock = _outcome(model, batch)
    installed = install(model, policy=policy)
    installed.tile_tokens = 11
    ours = _outcome(model, batch)
    assert float(ours[0]) == pytest.approx(float(stock[0]), rel=1e-6)
    for name, grad in ours[1].items():
        assert float((grad - stock[1][name]).norm() / stock[1][name].norm()) < 1e-5, name


def test_two_micro_batches_add_up():
    model = tiny("qwen3", CASES["qwen3"][0], torch.float64, adapter=False)
    once = tiled(model, packed_row(), "recompute", 17)[1]
    install(model, policy="recompute").tile_tokens = 17
    clear, model.zero_grad = model.zero_grad, lambda *_, **__: None
    families.computed(model, packed_row())
    _, twice = families.computed(model, packed_row())
    model.zero_grad = clear
    for name, grad in twice.items():
        torch.testing.assert_close(grad, 2 * once[name], rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------------- memory and work


class Largest(TorchDispatchMode):
    """The most rows that any result as wide as gate and up, or as the activation, has."""

    def __init__(self, widths: set[int]) -> None:
        super().__init__()
        self.widths, self.rows = widths, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if torch.is_tensor(tensor) and tensor.ndim == 2 and tensor.shape[1] in self.widths:
                self.rows = max(self.rows, tensor.shape[0])
        return result


@pytest.mark.parametrize("family", ["llama", SANDWICH, PARALLEL])
@pytest.mark.parametrize(
    ("policy", "tile", "rows"), [("recompute", 16, 16), ("recompute", None, 60), ("keep", 16, 60)]
)
def test_gate_and_up_exist_for_a_tile_only(family, policy, tile, rows):
    """Neither they nor the activation nor a gradient of them has more rows, forward or backward."""
    shape = {
        "intermediate_size": 72,
        "num_hidden_layers": 1,
        "sliding_window": None,
        "hidden_size": 24,
        "head_dim": 8,
    }
    model = tiny(family, shape, torch.float32, rank=3)
    for name, parameter in model.named_parameters():  # weights have rows of the same widths
        parameter.requires_grad_("lora_A" in name and "gate_proj" in name)
    with Largest({72, 144}) as seen:
        tiled(model, packed_row(), policy, tile)
    # 24 rows of the down projection's weight are as wide as the activation
    assert seen.rows == max(rows, 24)


@pytest.mark.parametrize("family", ["llama", SANDWICH])
def test_weights_are_read_once_a_pass_and_gate_and_up_computed_twice_in_all(family, monkeypatch):
    reads, computes = [], []
    weight, compute = Group.weight, layer_mlp.compute_gate_up
    monkeypatch.setattr(
        Group, "weight", lambda self, *a, **o: reads.append(self.columns) or weight(self, *a, **o)
    )
    monkeypatch.setattr(
        layer_mlp, "compute_gate_up", lambda *arguments: computes.append(1) or compute(*arguments)
    )
    model = tiny(
        family, {"num_hidden_layers": 1, "sliding_window": None, "layer_types": None}, torch.float32, rank=8
    )
    counts = []
    for tile in (None, 20):
        reads.clear(), computes.clear()
        tiled(model, packed_row(), "recompute", tile)
        counts.append((sorted(reads), len(computes)))
    (untiled_reads, untiled), (tiled_reads, in_tiles) = counts
    # the down projection of a family without a norm behind it is read forward and backward, as all others are
    assert tiled_reads == untiled_reads
    assert untiled_reads.count(128) == 2
    assert (untiled, in_tiles) == (2, 2 * 3)


# ---------------------------------------------------------------------- when, and how long


@pytest.mark.parametrize("tokens", [1, 2, 127, 128, 129, 16_385, 20_000, 65_537, 500_000])
@pytest.mark.parametrize("most", [1, 7, 100, 128, 1000, 16_384])
def test_tiles_cover_every_row_once_and_are_few_and_alike(tokens, most):
    if tokens // most > 10_000:
        pytest.skip("nothing new")
    rows = tile_rows(tokens, most)
    assert rows[0].start == 0
    assert [tile.stop for tile in rows[:-1]] == [tile.start for tile in rows[1:]]
    assert rows[-1].stop == tokens
    sizes = [tile.stop - tile.start for tile in rows]
    assert max(sizes) <= most
    assert len(set(sizes[:-1])) <= 1
    assert sizes[-1] <= sizes[0]
    assert len(sizes) == -(-tokens // most)
    if most % 128 == 0:
        assert all(size % 128 == 0 for size in sizes[:-1])


def test_rows_of_a_usual_length_are_not_tiled(monkeypatch):
    """8,192 tokens take the launches that they took; more than 16,384 do not."""
    called = []
    monkeypatch.setattr(tiles, "mlp_forward", lambda *_: called.append(1) or pytest.fail("tiled"))
    model = tiny("llama", {"num_hidden_layers": 1}, torch.float32)
    installed = install(model, policy="recompute")
    assert installed.tile_tokens == TILE_TOKENS == 16_384
    installed.tile_tokens = TOKENS
    families.computed(model, packed_row())
    installed.tile_tokens = None
    families.computed(model, packed_row())
    installed.tile_tokens = TOKENS - 1
    with pytest.raises(pytest.fail.Exception):
        families.computed(model, packed_row())
    assert called == [1]


# ---------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["adapter", "full"])
@pytest.mark.parametrize("family", ["llama", SANDWICH, PARALLEL, UNGATED])
def test_tiles_on_the_gpu_err_no_more_than_whole_rows(family, mode):
    shape = {"hidden_size": 256, "intermediate_size": 640, "head_dim": 64, "sliding_window": None}
    batch = {"input_ids": torch.randint(3, 384, (1, 1500), generator=torch.Generator().manual_seed(0)).cuda()}
    model = tiny(family, CASES[family][0] | shape, torch.float32, adapter=mode == "adapter", rank=8).cuda()
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    exact_model = tiny(
        family, CASES[family][0] | shape, torch.float32, adapter=mode == "adapter", rank=8
    ).cuda()
    for name, parameter in exact_model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    exact = families.computed(exact_model.double(), batch)
    with torch.autocast("cuda", torch.bfloat16):
        whole = tiled(model, batch, "recompute", None)
        parts = tiled(model, batch, "recompute", 256)
    assert families.squared_error(parts, exact) < 1.1 * families.squared_error(whole, exact)
    assert worst(parts, whole)[0] < 0.02


@pytest.mark.gpu
def test_a_long_row_takes_the_memory_of_a_tile():
    """65,537 tokens with 32,768 columns of gate and up: 2^31 elements and more, of which a tile is there."""
    shape = {"hidden_size": 256, "intermediate_size": 16_384, "num_hidden_layers": 1, "head_dim": 64}
    model = tiny("llama", shape | {"max_position_embeddings": 65_537}, torch.float32, rank=8).cuda()
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    ids = torch.randint(3, 384, (1, 65_537), generator=torch.Generator().manual_seed(0)).cuda()
    peaks, losses = [], []
    for tile in (None, 8192):
        installed = install(model, policy="recompute")
        installed.tile_tokens = tile
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            hidden = model.get_base_model().model(ids, use_cache=False).last_hidden_state
        loss = hidden.float().square().mean()
        loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        losses.append((float(loss), grads))
        peaks.append(torch.cuda.max_memory_allocated())
        model.zero_grad(set_to_none=True)
        installed.undo()
    assert peaks[1] < peaks[0] - 4 * 2**30
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-4)
    for name, grad in losses[1][1].items():
        whole = losses[0][1][name]
        assert float((grad - whole).norm() / whole.norm()) < 0.02, name
