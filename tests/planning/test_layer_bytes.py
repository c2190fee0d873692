"""The tape against the decoder itself, run on tensors without memory: every buffer, byte for byte."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.fake_gpu import FakeOffloader, Live, fake_gpu, in_4_bits, materialise
from tunesmith.kernels import attention_cudnn
from tunesmith.kernels.attention import Documents, Heads
from tunesmith.models import offload
from tunesmith.models.install import Installed, install
from tunesmith.models.projections import SPARE_ROWS
from tunesmith.models.tiles import ALIGNED, TILE_TOKENS
from tunesmith.planning import layer_sizes, policies, workspaces
from tunesmith.planning.facts import LayerFacts, Work
from tunesmith.planning.layer_bytes import layer_bytes
from tunesmith.planning.policies import HELD
from tunesmith.planning.read_facts import read_facts

SIZES = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1024, "max_position_embeddings": 4096,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "llama": {},
    "qwen2": {"head_dim": None},
    "qwen3": {},
    "gemma2": {"sliding_window": 64},
    "phi3": {"head_dim": None},
    "olmo2": {"head_dim": None},
    "cohere": {"head_dim": None},
    "starcoder2": {"head_dim": None},
    "glm4": {},
}
"""A family for each shape of a layer: separate and fused projections, biases, norms before, behind, around and on q
and k, parallel blocks, no gate."""
KINDS = {
    "qlora": ("nf4", 16),
    "lora": ("none", 16),
    "wide lora": ("none", 40),
    "widest lora": ("none", 80),
    "full": ("none", 0),
}
DOCUMENTS = (700, 700)
TILED = 0.01


@dataclass(frozen=True)
class Run:
    """A model on the fake GPU."""

    live: Live
    installed: Installed
    layer: LayerFacts
    work: Work
    hidden: torch.Tensor
    keywords: dict[str, Any]


def model_of(family: str, rank: int, **sizes: int) -> tuple[Any, Any]:
    changes = {n: value for n, value in (SIZES | FAMILIES[family] | sizes).items() if value is not None}
    config = AutoConfig.for_model(family, **changes)
    with torch.device("meta"):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = AutoModelForCausalLM.from_config(config)
        finally:
            torch.set_default_dtype(before)
        model.requires_grad_(rank == 0)
        if rank:
            lora = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
            model = get_peft_model(model, lora, autocast_adapter_dtype=False)
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.float()
    return model, config


FULL = ("gemma2", "cohere", "starcoder2")
MODELS = [("llama", kind) for kind in KINDS]
MODELS += [(family, "qlora") for family in FAMILIES if family != "llama"] + [
    (family, "full") for family in FULL
]
TILES = 512
LEAN = ("recompute_gate_up", "recompute", "offload")


@pytest.fixture(scope="module", params=MODELS, ids="-".join)
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    family, kind = request.param
    quantize, rank = KINDS[kind]
    model, config = model_of(family, rank)
    layer = read_facts(config.to_dict(), family).layers[0]
    work = Work(DOCUMENTS, sum(DOCUMENTS), quantize=quantize, rank=rank, trained_itemsize=4 if rank else 2)
    with fake_gpu() as live:
        materialise(model)
        if quantize == "nf4":
            in_4_bits(model)
        installed = install(model)
        installed.offloader = FakeOffloader()
        model.train()
        tokens = work.tokens
        hidden = torch.empty(1, tokens, layer.hidden, dtype=torch.bfloat16, requires_grad=True)
        width = layer.rotary_dim or layer.head_dim
        cos, sin = (torch.empty(1, tokens, width, dtype=torch.bfloat16) for _ in range(2))
        documents = Documents(DOCUMENTS, torch.empty(len(DOCUMENTS) + 1, dtype=torch.int32))
        keywords = {
            "position_embeddings": (cos, sin), "packed_documents": documents, "document_lengths": DOCUMENTS,
            "cu_seq_lens_q": documents.cu_seqlens,
        }  # fmt: skip
        yield Run(live, installed, layer, work, hidden, keywords)


def cleared(run: Run) -> int:
    """Bytes that are there between steps, without gradients of an earlier one."""
    run.installed.layers[0].zero_grad(set_to_none=True)
    run.hidden.grad = None
    gc.collect()
    run.live.peak = run.live.now
    return run.live.now


def output_of(run: Run) -> torch.Tensor:
    """What the first layer makes of the hidden states."""
    out = run.installed.layers[0](run.hidden, **run.keywords)
    return out[0] if isinstance(out, tuple) else out


def seen(run: Run, policy: str) -> tuple[int, int, int]:
    """Bytes of a layer as the decoder allocates them: the most forward, kept, the most backward."""
    live = run.live
    run.installed.set_policy(policy)
    if policy in policies.UNPACKED:  # from its first pass on its weights are there
        output_of(run)
    base = cleared(run)
    out = output_of(run)
    forward = live.peak - base
    own, given = out.untyped_storage().nbytes(), run.hidden.untyped_storage().nbytes()
    kept = live.now - base - own + given
    live.peak = before = live.now
    out.backward(torch.empty_like(out))
    assert not run.installed.fallbacks
    return forward, kept, live.peak - before


def test_the_tape_is_the_decoder(run: Run) -> None:
    """Every policy with one family, and every family under a few of them."""
    llama = run.installed.row is not None and run.installed.row.model_type == "llama"
    columns = run.layer.gate_up_columns
    # a bias as it is cast for a product, sums of norms' gradients: columns and not rows, not counted one by one
    allowed = 2 * columns * biased(run.layer), (16 if run.work.full else 4) * columns
    wrong = {}
    for policy in HELD if llama else ("keep_all", *LEAN[::2]):
        cost = layer_bytes(run.layer, run.work, policy)
        forward, kept, backward = seen(run, policy)
        off = cost.kept + cost.moved - kept, abs(cost.forward - forward), abs(cost.backward - backward)
        if off[0] or off[1] > allowed[0] or off[2] > allowed[1]:
            wrong[policy] = off
    assert not wrong


def test_weights_that_a_layer_holds_are_as_large_as_foreseen(run: Run) -> None:
    run.installed.set_policy("keep_all")
    before = cleared(run)
    run.installed.set_policy(policies.UNPACKED[0])
    output_of(run)
    held = layer_bytes(run.layer, run.work, policies.UNPACKED[0]).unpacked
    assert cleared(run) - before == held
    assert (held > 0) == (run.work.quantize == "nf4")
    run.installed.set_policy("keep_all")
    assert cleared(run) == before


def test_the_tape_in_tiles_is_the_decoder_in_tiles(run: Run) -> None:
    run.installed.tile_tokens = TILES
    wrong = {}
    try:
        for policy in LEAN:
            forward, kept, backward = seen(run, policy)
            cost = layer_bytes(run.layer, replace(run.work, tile_tokens=TILES), policy)
            close = (cost.forward, cost.backward) == pytest.approx((forward, backward), rel=TILED)
            if cost.kept + cost.moved != kept or not close:
                wrong[policy] = (cost, forward, kept, backward)
    finally:
        run.installed.tile_tokens = TILE_TOKENS
    assert not wrong


def biased(layer: LayerFacts) -> bool:
    return layer.qkv_bias or layer.output_bias or layer.gate_up_bias or layer.down_bias


def test_what_the_tape_repeats_of_other_modules() -> None:
    assert (policies.IN_FLIGHT, layer_sizes.SPARE_ROWS) == (offload.IN_FLIGHT, SPARE_ROWS)
    assert (layer_sizes.TILE_ALIGNED, Work((1,), 1).tile_tokens) == (ALIGNED, TILE_TOKENS)
    of_cudnn = attention_cudnn.PART_BYTES, attention_cudnn.SHORTEST_EQUAL
    assert of_cudnn == (workspaces.PART_BYTES, workspaces.SHORTEST_EQUAL)


@pytest.mark.parametrize(
    "lengths", [(4096, 4096), (63, 63), (700, 3, 12), (200_000,), (90_000, 90_000, 11)], ids=str
)
@pytest.mark.parametrize("heads", [Heads(32, 8, 128), Heads(9, 3, 64), Heads(16, 16, 96)], ids=str)
def test_the_workspace_of_attention_is_that_of_a_part(lengths: tuple[int, ...], heads: Heads) -> None:
    documents = Documents(lengths, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32))
    size = (len(lengths), lengths[0]) if lengths == (lengths[0],) * len(lengths) and lengths[0] > 63 else None
    tokens = math.prod(size or attention_cudnn.ragged_size(documents))
    layer = LayerFacts(64, 64, heads.query, heads.key_value, heads.size, heads.size)
    part = attention_cudnn.backward_part(tokens, heads, 2)
    expected = attention_cudnn.backward_workspace(tokens, part, 2)
    assert workspaces.attention_workspace(layer, Work(lengths, 1)) == expected


def test_less_is_kept_by_every_leaner_policy() -> None:
    layer = LayerFacts(4096, 14336, 32, 8, 128, 128)
    work = Work((4096, 4096), 8192, quantize="nf4")
    kept = [layer_bytes(layer, work, policy).kept for policy in ("keep_all", "keep", "recompute_gate_up")]
    kept += [
        layer_bytes(layer, work, policy).kept for policy in ("recompute_projections", "recompute", "offload")
    ]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == len(kept)


def test_more_tokens_take_more_of_everything() -> None:
    layer = LayerFacts(1024, 3072, 16, 4, 64, 64)
    work = Work((512,), 512)
    twice = replace(work, documents=(512, 512), supervised=1024)
    for policy in HELD:
        one, two = layer_bytes(layer, work, policy), layer_bytes(layer, twice, policy)
        assert two.kept + two.moved > 1.9 * (one.kept + one.moved)
        assert two.forward > one.forward
        assert two.backward > one.backward


def test_the_fake_gpu_lets_go_of_what_dies() -> None:
    with fake_gpu() as live:
        first = torch.empty(1000, dtype=torch.float32)
        assert live.now == 4096
        second = nn.functional.silu(first)
        view = second[10:]
        del first
        assert (live.now, live.peak) == (4096, 8192)
        del second
        assert live.now == 4096
        del view
        assert live.now == 0
