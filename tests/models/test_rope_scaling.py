"""Rotary positions beyond the length that a model was made for: the config, the tables, and documents in packs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.support.documents import random_corpus
from tests.support.tiny import save_tiny_model, tiny_config
from tunesmith.contracts.errors import UserError
from tunesmith.data.batches import collate
from tunesmith.models import install as install_module
from tunesmith.models.attention import document_kwargs, packed_attention
from tunesmith.models.install import install
from tunesmith.models.loader import load_model
from tunesmith.models.rope_scaling import (
    document_lengths,
    made_for,
    rotate_by_document,
    stretch,
)

CPU = torch.device("cpu")
MADE_FOR = 64
LENGTHS = [9, 150, 30, 70, 1, 64, 65]
"""Documents of a pack: within the length that the model was made for, beyond it, and at its end."""

FACTORS = {"short_factor": [1.0, 1.1, 1.3, 2.0], "long_factor": [1.5, 2.0, 3.0, 4.0]}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.3},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0},
    "llama3": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {"rope_type": "longrope", "factor": 4.0, **FACTORS},
}
REACH = {"linear": 256, "dynamic": 64, "yarn": 256, "llama3": 256, "longrope": 256}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model made for 64 positions, with four pairs of rotated channels."""
    path = tmp_path_factory.mktemp("short") / "model"
    return save_tiny_model(path, max_position_embeddings=MADE_FOR, num_key_value_heads=4)


def scaled(folder: Path, kind: str) -> Any:
    return load_model(str(folder), device=CPU, dtype=torch.float32, rope_scaling=SCALINGS[kind])


def stock(folder: Path, kind: str) -> Any:
    """The same weights in a model of transformers whose config is written out by hand."""
    rope = SCALINGS[kind] | {"rope_theta": 10000.0}
    if kind in ("yarn", "llama3", "longrope"):
        rope["original_max_position_embeddings"] = MADE_FOR
    config = tiny_config(
        max_position_embeddings=REACH[kind], num_key_value_heads=4, rope_parameters=copy.deepcopy(rope)
    )
    model = LlamaForCausalLM(config).eval()
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    model.load_state_dict(weights)
    return model


def pack() -> Any:
    return collate(random_corpus(LENGTHS), range(len(LENGTHS)))


def alone_tables(make: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the pack's documents, each computed by a model of transformers that saw nothing else."""
    tables = [make()(torch.zeros(1), torch.arange(length)[None]) for length in LENGTHS]
    cos, sin = (torch.cat([table[index][0] for table in tables]) for index in (0, 1))
    return cos, sin


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize("kind", SCALINGS)
def test_fused_layers_turn_by_the_tables_of_transformers(folder: Path, kind: str, monkeypatch) -> None:
    model, batch = scaled(folder, kind), pack()
    calls = []
    run_layer = install_module.run_layer
    monkeypatch.setattr(install_module, "run_layer", lambda call, x: calls.append(call) or run_layer(call, x))
    install(model)
    with packed_attention(model, "sdpa"):
        model.model(
            input_ids=batch.ids_T[None],
            position_ids=batch.position_ids_T[None],
            use_cache=False,
            **document_kwargs(batch),
        )
    cos, sin = alone_tables(lambda: stock(folder, kind).model.rotary_emb)
    assert len(calls) == 2
    for call in calls:
        assert torch.equal(call.cos_TK, cos)
        assert torch.equal(call.sin_TK, sin)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", SCALINGS)
def test_a_document_does_not_feel_what_it_is_packed_with(folder: Path, kind: str, fused: bool) -> None:
    model, batch = scaled(folder, kind), pack()
    if fused:
        assert len(install(model).fused) == 2
    with packed_attention(model, "sdpa"):
        packed = model(
            input_ids=batch.ids_T[None],
            position_ids=batch.position_ids_T[None],
            use_cache=False,
            **document_kwargs(batch),
        ).logits[0]
    for ids, ours in zip(batch.ids_T.split(LENGTHS), packed.split(LENGTHS), strict=True):
        theirs = stock(folder, kind)(input_ids=ids[None], use_cache=False).logits[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)  # sums in another order


def phi3(**changes: Any) -> Phi3Config:
    values: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "original_max_position_embeddings": MADE_FOR, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1,
        "rope_scaling": {"type": "longrope", **FACTORS},
    }  # fmt: skip
    return Phi3Config(**(values | changes))


def test_a_model_that_came_with_long_positions_has_them_by_document() -> None:
    model = Phi3ForCausalLM(phi3())
    assert rotate_by_document(model) == ["model.rotary_emb"]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    cos, sin = model.model.rotary_emb(torch.zeros(1), positions[None])
    alone = alone_tables(lambda: Phi3ForCausalLM(phi3()).model.rotary_emb)
    assert torch.equal(cos[0], alone[0])
    assert torch.equal(sin[0], alone[1])


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_token_behind_a_cache_turns_by_the_length_so_far(folder: Path, kind: str) -> None:
    for position in (3, 63, 64, 200):
        ours = scaled(folder, kind).model.rotary_emb(torch.zeros(1), torch.tensor([[position]]))
        theirs = stock(folder, kind).model.rotary_emb(torch.zeros(1), torch.tensor([[position]]))
        assert torch.equal(ours[0], theirs[0])
    rows = torch.stack([torch.arange(100), torch.arange(100)])
    ours = scaled(folder, kind).model.rotary_emb(torch.zeros(1), rows)
    assert torch.equal(ours[1], stock(folder, kind).model.rotary_emb(torch.zeros(1), rows)[1])


class NoAnswers(TorchDispatchMode):
    """Refuses every operation that brings a value of a tensor to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_the_device_is_not_asked(folder: Path, kind: str, monkeypatch) -> None:
    rotary, positions = scaled(folder, kind).model.rotary_emb, pack().position_ids_T[None]
    rotary(torch.zeros(1), positions)  # LongRoPE's factors go to the device once
    with monkeypatch.context() as patched, NoAnswers():
        patched.delitem(ROPE_INIT_FUNCTIONS, kind)
        rotary(torch.zeros(1), positions)
    if kind == "dynamic":
        with NoAnswers(), pytest.raises(AssertionError):
            stock(folder, kind).model.rotary_emb(torch.zeros(1), positions)


def test_a_copy_of_a_model_turns_by_its_own_frequencies(folder: Path) -> None:
    model = scaled(folder, "dynamic")
    other = copy.deepcopy(model)
    other.model.rotary_emb.inv_freq *= 2
    positions = torch.arange(5)[None]
    ours, theirs = (each.model.rotary_emb(torch.zeros(1), positions)[0] for each in (model, other))
    assert torch.equal(ours[0, 2], theirs[0, 1])
    assert not torch.equal(ours[0, 1], theirs[0, 1])


def test_other_kinds_are_left_alone(folder: Path) -> None:
    for kind in ("linear", "yarn", "llama3"):
        assert "forward" not in vars(scaled(folder, kind).model.rotary_emb)


def test_lengths_of_documents() -> None:
    lengths, longest = document_lengths(torch.tensor([[0, 1, 2, 0, 0, 1], [7, 8, 0, 1, 2, 3]]))
    assert lengths.tolist() == [[3, 3, 3, 1, 2, 2], [9, 9, 4, 4, 4, 4]]
    assert longest.tolist() == [3, 1, 2, 9, 4, 0, 0, 0, 0, 0, 0, 0]


# ---------------------------------------------------------------- the config


@pytest.mark.parametrize("kind", SCALINGS)
def test_the_length_that_a_config_says(kind: str) -> None:
    config = tiny_config(max_position_embeddings=MADE_FOR)
    stretch(config, SCALINGS[kind])
    assert config.max_position_embeddings == REACH[kind]
    assert made_for(config) == (None if kind == "dynamic" else REACH[kind])
    assert SCALINGS[kind].items() <= config.rope_parameters.items()
    before = copy.deepcopy(config.to_dict())
    stretch(config, SCALINGS[kind])  # a result that trains on with the same run file
    assert config.to_dict() == before


def test_a_scaling_takes_the_place_of_the_models_own() -> None:
    config = tiny_config(
        max_position_embeddings=1024,
        rope_parameters=SCALINGS["llama3"] | {"original_max_position_embeddings": 64, "rope_theta": 5e5},
    )
    stretch(config, {"rope_type": "yarn", "factor": 32.0})
    assert config.rope_parameters == {
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 5e5,
    }
    assert config.max_position_embeddings == 2048
    stretch(config, SCALINGS["llama3"] | {"original_max_position_embeddings": 128})
    assert config.max_position_embeddings == 512


def test_llama_3_1_keeps_its_reach() -> None:
    own = SCALINGS["llama3"] | {"original_max_position_embeddings": 64, "rope_theta": 5e5}
    config = tiny_config(max_position_embeddings=1024, rope_parameters=own)
    stretch(config, SCALINGS["llama3"] | {"factor": 8.0})
    assert config.max_position_embeddings == 1024
    stretch(config, SCALINGS["llama3"] | {"factor": 32.0})
    assert config.max_position_embeddings == 2048


def test_a_length_that_the_config_has_beside_its_positions() -> None:
    config = phi3()
    stretch(
        config, {"rope_type": "longrope", "factor": 8.0, "original_max_position_embeddings": 32, **FACTORS}
    )
    assert config.rope_parameters["original_max_position_embeddings"] == 32
    assert config.max_position_embeddings == 256
    config = phi3()
    stretch(config, {"rope_type": "longrope", **FACTORS})
    assert (config.original_max_position_embeddings, config.max_position_embeddings) == (64, 256)


def gemma3() -> Gemma3TextConfig:
    return Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=MADE_FOR, sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip


def test_layers_with_a_window_need_no_longer_positions() -> None:
    config = gemma3()
    windowed = copy.deepcopy(config.rope_parameters["sliding_attention"])
    stretch(config, SCALINGS["yarn"])
    assert config.rope_parameters["sliding_attention"] == windowed
    assert config.rope_parameters["full_attention"]["rope_type"] == "yarn"
    assert config.rope_parameters["full_attention"]["factor"] == 4.0
    assert config.max_position_embeddings == made_for(config) == 256
    with pytest.raises(
        UserError, match="dynamic has frequencies by the length of a document, and gemma3_text"
    ):
        stretch(gemma3(), SCALINGS["dynamic"])


def test_what_cannot_be_stretched_is_refused() -> None:
    with pytest.raises(UserError, match="gpt2 has no rotary positions"):
        stretch(GPT2Config(), SCALINGS["linear"])
    wrong = {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0], "long_factor": [2.0]}
    with pytest.raises(UserError, match="have 1 numbers, and this model rotates 4 pairs"):
        stretch(tiny_config(), wrong)
    with pytest.raises(UserError, match="longrope does not say how much longer rows may be") as caught:
        stretch(tiny_config(), {"rope_type": "longrope", **FACTORS})
    assert caught.value.hint == "Add factor, the new length over the original one."


@pytest.mark.parametrize("kind", SCALINGS)
def test_what_is_saved_loads_the_same(folder: Path, tmp_path: Path, kind: str) -> None:
    model = scaled(folder, kind)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert again.model.rotary_emb.attention_scaling == model.model.rotary_emb.attention_scaling
    assert again.config.rope_parameters == model.config.rope_parameters
    assert again.config.max_position_embeddings == REACH[kind]
