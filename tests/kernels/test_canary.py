"""The canary: finds a kernel that is wrong, switches it off alone, remembers the outcome, survives damage."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from tunesmith.kernels import attention, canary, launch
from tunesmith.kernels.attention import Documents, Heads, Scores, choose_backend
from tunesmith.kernels.canary import ModelShape, Traits, check_kernels
from tunesmith.kernels.catalog import CATALOG

SHAPE = ModelShape(width=48, inner=80, heads=Heads(4, 2, 16), rank=5, vocabulary=97, nf4=True)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "switched_off", set())
    monkeypatch.setattr(attention, "switched_off", off := set())
    monkeypatch.setattr(canary, "attention_off", off)


def _break(monkeypatch: pytest.MonkeyPatch, name: str, operation) -> None:
    monkeypatch.setitem(CATALOG, name, dataclasses.replace(CATALOG[name], op=operation))


def test_every_row_of_the_catalog_is_checked():
    assert set(canary._SIZES) == set(CATALOG)


FAMILIES = {
    "gemma3": Traits(norm_offset=1.0, behind=True, qk_norm=True, activation="gelu_tanh"),
    "olmo2": Traits(before=False, behind=True, qk_norm=True, qk_full=True),
    "phi3": Traits(one_qkv=True, one_gate_up=True, rotary_dim=12),
    "cohere": Traits(norm="layer", interleaved=True, spread=True),
    "starcoder2": Traits(norm="layer", norm_bias=True, activation="gelu_tanh", gated=False),
    "granite": Traits(residual_multiplier=0.22),
    "qwen3, full": Traits(qk_norm=True, norms_train=True),
    "starcoder2, full": Traits(
        norm="layer", norm_bias=True, activation="gelu_tanh", gated=False, norms_train=True
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_kernels_of_a_family_pass(family):
    shape = dataclasses.replace(SHAPE, traits=FAMILIES[family])
    assert check_kernels(shape, torch.float32, CPU) == []


def test_each_kernel_is_checked_for_the_families_that_use_it():
    shapes = [SHAPE, *(dataclasses.replace(SHAPE, traits=traits) for traits in FAMILIES.values())]
    checked = [{name for name, size_of in canary._SIZES.items() if size_of(s) is not None} for s in shapes]
    assert set().union(*checked) == set(CATALOG)
    ours = {"qk_norm_rope", "qk_norm_rope_backward_", "add_normed", "layer_norm", "layer_norm_backward"}
    assert not checked[0] & ours, "Llama has none of them"
    assert checked[1] & ours == {"qk_norm_rope", "qk_norm_rope_backward_", "add_normed"}
    assert "rope_qkv_" not in checked[1]


def test_right_kernels_stay_on():
    state = torch.get_rng_state()
    assert check_kernels(SHAPE, torch.float32, CPU) == []
    assert launch.switched_off == set()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["rms_norm", "rope_qkv_", "glu_backward_", "dequantize_nf4", "logprob_"])
def test_a_wrong_kernel_is_named_and_switched_off_alone(monkeypatch, name):
    row = CATALOG[name]

    def wrong(**inputs):
        result = row.op(**inputs)
        for tensor in [inputs[key] for key in row.mutates] or [r for r in result if r is not None]:
            if tensor.is_floating_point():
                tensor.mul_(1.01)
        return result

    _break(monkeypatch, name, wrong)
    (finding,) = check_kernels(SHAPE, torch.float32, CPU)
    assert finding.name == name
    assert f"The kernel {name} errs by" in str(finding)
    assert launch.switched_off == {name}
    assert not launch.use_triton(torch.empty(1), name)


def test_a_kernel_that_cannot_run_is_switched_off(monkeypatch):
    def fails(**_):
        raise RuntimeError("no kernel image is available")

    _break(monkeypatch, "glu", fails)
    (finding,) = check_kernels(SHAPE, torch.float32, CPU)
    assert (finding.name, finding.error) == ("glu", float("inf"))


def test_a_wrong_attention_backend_is_passed_over(monkeypatch):
    good = attention.BACKENDS["sdpa"]

    def forward(*call):
        output, saved = good.forward(*call)
        return output * 1.1, saved

    bad = dataclasses.replace(good, forward=forward)
    monkeypatch.setattr(attention, "BACKENDS", table := {"fast": bad, "sdpa": good})
    monkeypatch.setattr(canary, "BACKENDS", table)
    fused = torch.zeros(4, SHAPE.heads.columns, dtype=torch.bfloat16)
    documents = Documents((4,), torch.tensor([0, 4], dtype=torch.int32))
    assert choose_backend(fused, SHAPE.heads, documents) == "fast"
    found = check_kernels(SHAPE, torch.bfloat16, CPU)
    assert [finding.name for finding in found] == ["fast"]
    assert choose_backend(fused, SHAPE.heads, documents) == "sdpa"


def test_every_kind_of_scores_is_checked(monkeypatch):
    """A backend that is wrong about windows alone, in a model with windows longer than the canary's documents."""
    good = attention.BACKENDS["sdpa"]

    def forward(fused_TN, heads, documents, scores, room):
        wrong = scores if scores.window is None else dataclasses.replace(scores, window=scores.window + 1)
        return good.forward(fused_TN, heads, documents, wrong, room)

    monkeypatch.setattr(
        attention, "BACKENDS", table := {"fast": dataclasses.replace(good, forward=forward), "sdpa": good}
    )
    monkeypatch.setattr(canary, "BACKENDS", table)
    assert check_kernels(SHAPE, torch.bfloat16, CPU) == []
    mixed = dataclasses.replace(SHAPE, scores=(Scores(), Scores(scale=0.1, window=4096)))
    assert [finding.name for finding in check_kernels(mixed, torch.bfloat16, CPU)] == ["fast"]


def test_the_outcome_is_remembered_for_this_shape(monkeypatch, tmp_path: Path):
    calls = []
    original = canary.errors
    monkeypatch.setattr(canary, "errors", lambda *a: calls.append(a) or original(*a))
    assert check_kernels(SHAPE, torch.float32, CPU, tmp_path) == []
    first = len(calls)
    assert first == sum(size_of(SHAPE) is not None for size_of in canary._SIZES.values())
    assert check_kernels(SHAPE, torch.float32, CPU, tmp_path) == []
    assert len(calls) == first
    check_kernels(dataclasses.replace(SHAPE, rank=6), torch.float32, CPU, tmp_path)
    assert len(calls) == 2 * first


def test_a_remembered_failure_is_applied_and_damage_is_checked_anew(monkeypatch, tmp_path: Path):
    check_kernels(SHAPE, torch.float32, CPU, tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(json.dumps([{"name": "glu", "error": 1.0, "tolerance": 0.1}]))
    assert [finding.name for finding in check_kernels(SHAPE, torch.float32, CPU, tmp_path)] == ["glu"]
    assert launch.switched_off == {"glu"}
    file.write_text("[{")
    assert check_kernels(SHAPE, torch.float32, CPU, tmp_path) == []
    assert json.loads(file.read_text()) == []


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    assert check_kernels(SHAPE, torch.float32, CPU, tmp_path / "file" / "below") == []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_real_shapes_pass_on_this_card(dtype):
    shape = ModelShape(width=4096, inner=14336, heads=Heads(32, 8, 128), rank=16, vocabulary=128256, nf4=True)
    assert check_kernels(shape, dtype, torch.device("cuda")) == []
