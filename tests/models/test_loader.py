"""Loading a model: what goes wrong comes as one sentence, and nothing is read from a pickle or made up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import errors as hub
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertModel, T5Config, T5ForConditionalGeneration

from tests.support.tiny import save_tiny_model, tiny_tokenizer
from tunesmith.contracts.errors import UserError
from tunesmith.models import loader
from tunesmith.models.head import CausalModel
from tunesmith.models.head_check import check_head
from tunesmith.models.loader import choose_dtype, load_model, load_tokenizer
from tunesmith.models.projections import write_weight

CPU = torch.device("cpu")


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be damaged."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "copy"))


def load(name: object):
    return load_model(str(name), device=CPU, dtype=torch.float32)


def refusal(name: object, loader: Callable = load) -> UserError:
    with pytest.raises(UserError) as caught:
        loader(str(name))
    assert caught.value.message.startswith("model.name: ")
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 2
    return caught.value


def test_a_model_arrives_frozen_in_the_type_asked_for(tiny_model_dir: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(str(tiny_model_dir), device=CPU, dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert not any(p.requires_grad for p in model.parameters())


def test_four_bits_hold_the_linear_layers_and_their_scales_stay_exact(wide_model_dir: Path) -> None:
    import bitsandbytes

    model = load_model(str(wide_model_dir), device=CPU, dtype=torch.float32, quantize="nf4")
    held = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(held) == 14
    assert {m.weight.quant_state.quant_type for m in held} == {"nf4"}
    assert all(m.weight.quant_state.nested for m in held)
    assert not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in held)


def test_four_bits_compute_what_they_hold(wide_model_dir: Path) -> None:
    model = load_model(str(wide_model_dir), device=CPU, dtype=torch.float32, quantize="nf4")
    layer = model.model.layers[0].mlp.down_proj
    x = torch.randn(3, 128)
    exact = torch.empty(64, 128)
    write_weight(layer, exact)
    torch.testing.assert_close(layer(x), x @ exact.T, rtol=1e-5, atol=1e-6)


def test_four_bits_that_a_cpu_would_misread_are_refused(tiny_model_dir: Path) -> None:
    with pytest.raises(UserError, match="32 columns, and bitsandbytes computes wrongly there"):
        load_model(str(tiny_model_dir), device=CPU, dtype=torch.float32, quantize="nf4")


def test_eight_bits_hold_the_linear_layers(tiny_model_dir: Path) -> None:
    exact = load(tiny_model_dir)
    model = load_model(str(tiny_model_dir), device=CPU, dtype=torch.float32, quantize="int8")
    held = [m for m in model.modules() if type(m).__name__ == "Linear8bitLt"]
    assert len(held) == 14
    assert {m.weight.dtype for m in held} == {torch.int8}
    ids = torch.arange(3, 40)[None]
    difference = (model(ids).logits - exact(ids).logits).abs().max()
    assert 0 < difference < 0.02 * exact(ids).logits.abs().max()  # 8 bits of each row's largest value


def test_scaled_positions(tiny_model_dir: Path) -> None:
    def positions(**scaling):
        model = load_model(str(tiny_model_dir), device=CPU, dtype=torch.float32, rope_scaling=scaling or None)
        return model.model.rotary_emb.inv_freq, model.config.max_position_embeddings

    plain, length = positions()
    halved, doubled = positions(type="linear", factor=2.0)
    torch.testing.assert_close(halved, plain / 2)
    assert doubled == 2 * length
    assert not torch.equal(positions(rope_type="yarn", factor=4.0)[0], plain)
    with pytest.raises(UserError, match=r"model.name: .* cannot be loaded"):
        positions(rope_type="yarm", factor=4.0)


def test_a_home_folder_is_found(tiny_model_dir: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tiny_model_dir.parent))
    assert load(f"~/{tiny_model_dir.name}").config.num_hidden_layers == 2
    assert load_tokenizer(f"~/{tiny_model_dir.name}").eos_token == "<|im_end|>"


def test_types_for_this_machine() -> None:
    assert choose_dtype("auto", CPU) == torch.float32
    assert choose_dtype("bfloat16", CPU) == torch.bfloat16


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("loader", [load, load_tokenizer])
def test_a_path_that_is_not_there_names_the_nearest(tiny_model_dir: Path, loader) -> None:
    error = refusal(tiny_model_dir.with_name("modle"), loader)
    assert "there is no folder" in error.message
    assert error.hint == f"Did you mean {tiny_model_dir}?"


@pytest.mark.parametrize("loader", [load, load_tokenizer])
@pytest.mark.parametrize("name", ["Nobody/nothing", "nothing-like-it"])
def test_a_hub_id_without_a_network(loader, name: str) -> None:
    error = refusal(name, loader)
    assert "the Hugging Face hub cannot be reached" in error.message
    assert "HF_HUB_OFFLINE" in (error.hint or "")


def test_what_can_be_no_hub_id() -> None:
    assert "neither a local folder nor a model on the Hugging Face hub" in refusal("a b/c!").message


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    assert "holds no config.json" in refusal(tmp_path).message
    (tmp_path / "adapter_config.json").write_text("{}")
    assert refusal(tmp_path).hint == "A LoRA adapter goes to adapter.path."
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal(tmp_path / "file").message


def _raises(error: BaseException):
    def from_pretrained(*_args: object, **_options: object):
        raise error

    return from_pretrained


class _Response:
    headers: dict[str, str] = {}  # noqa: RUF012
    request = None
    status_code = 403


HUB_FAILURES = [
    (hub.GatedRepoError, "is gated on the Hugging Face hub", "HF_TOKEN"),
    (hub.RepositoryNotFoundError, "neither a local folder nor a model on the Hugging Face hub", "spelling"),
    (hub.RevisionNotFoundError, "has no such branch, tag or commit", None),
]


@pytest.mark.parametrize(("kind", "sentence", "hint"), HUB_FAILURES)
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("loader", "auto"), [(load, "AutoModelForCausalLM"), (load_tokenizer, "AutoTokenizer")]
)
def test_what_the_hub_answers(
    monkeypatch, kind, sentence: str, hint: str | None, wrapped, loader, auto
) -> None:
    error: Exception = kind("403 Client Error", response=_Response())
    if wrapped:  # transformers raises OSError from the hub's own
        outer = OSError("There was an issue.\nMore lines.")
        outer.__cause__ = error
        error = outer
    monkeypatch.setattr(getattr(transformers, auto), "from_pretrained", _raises(error))
    with pytest.raises(UserError) as caught:
        loader("meta-llama/Some")
    assert sentence in caught.value.message
    assert (hint is None) == (caught.value.hint is None)
    assert hint is None or hint in (caught.value.hint or "")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), OSError(28, "No space left on device")])
def test_no_memory_and_no_disk_are_no_fault_of_the_model(tiny_model_dir: Path, monkeypatch, error) -> None:
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", _raises(error))
    with pytest.raises(type(error)) as caught:
        load(tiny_model_dir)
    assert caught.value is error


# ---------------------------------------------------------------- files


def test_pickled_weights_are_not_loaded(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"x": torch.zeros(2)}, folder / "pytorch_model.bin")
    assert "has no weights in safetensors, and pickled weights are not loaded" in refusal(folder).message


@pytest.mark.parametrize("content", [lambda b: b[: len(b) // 2], lambda b: b"garbage" * 99, lambda b: b""])
def test_damaged_weights(folder: Path, content) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(content(weights.read_bytes()))
    assert "are damaged" in refusal(folder).message


def test_a_missing_shard_is_named(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(weights))}
    first = {name: tensor for name, tensor in weights.items() if "00001" in files[name]}
    save_file(first, folder / "model-00001-of-00002.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names model-00002-of-00002.safetensors, which is not there" in refusal(folder).message


def _change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_tensors_that_are_missing_are_not_filled_with_random_numbers(folder: Path) -> None:
    _change_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    error = refusal(folder)
    assert (
        "lack 1 of the tensors of LlamaForCausalLM, such as model.layers.1.mlp.up_proj.weight"
        in error.message
    )
    assert "incomplete" in (error.hint or "")


def test_tensors_of_another_shape(folder: Path) -> None:
    _change_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.zeros(3)}))
    assert "have other shapes than its config.json says" in refusal(folder).message


@pytest.mark.parametrize(("text", "sentence"), [("{", "not a valid JSON"), ("{}", "`model_type`")])
def test_a_broken_config(folder: Path, text: str, sentence: str) -> None:
    (folder / "config.json").write_text(text)
    assert sentence in refusal(folder).message


def test_code_from_a_repository_is_not_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass C: pass\n")
    error = refusal(folder)
    assert "ships its own Python code" in error.message
    assert not (folder / "ran").exists()


def test_a_model_without_a_tokenizer(folder: Path) -> None:
    for file in [*folder.glob("tokenizer*"), *folder.glob("*.jinja")]:
        file.unlink()
    assert refusal(folder, load_tokenizer).message.endswith("has no tokenizer.")


@pytest.mark.parametrize("text", ["{}", "no json", '{"model": {"type": "Zork"}, "added_tokens": []}'])
def test_a_broken_tokenizer(folder: Path, text: str) -> None:
    (folder / "tokenizer.json").write_text(text)
    assert str(folder) in refusal(folder, load_tokenizer).message


# ---------------------------------------------------------------- other kinds of model

_BERT = {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 64}  # fmt: skip


def test_a_sequence_to_sequence_model(tmp_path: Path) -> None:
    config = T5Config(vocab_size=384, d_model=32, d_ff=64, num_layers=1, num_heads=4, d_kv=8)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    assert "is no causal language model" in refusal(tmp_path).message


def test_an_encoder_without_a_head(tmp_path: Path) -> None:
    BertModel(BertConfig(**_BERT)).save_pretrained(tmp_path)
    error = refusal(tmp_path)
    assert "cls.predictions" in error.message
    assert "config.json says BertModel: is it a causal language model?" in (error.hint or "")


def test_an_encoder_with_a_head_is_seen_to_look_ahead(tmp_path: Path) -> None:
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(**_BERT)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="its tokens see the ones behind them"):
        check_head(CausalModel(load(tmp_path), torch.float32))


def test_the_models_of_the_tests_load(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, tie_word_embeddings=False)
    assert load(tmp_path).lm_head.weight.data_ptr() != load(tmp_path).model.embed_tokens.weight.data_ptr()


def test_the_hub_is_not_asked_for_an_adapter_before_it_is_known_to_be_there(monkeypatch) -> None:
    """Its client would wait 23 seconds."""
    calls: list[str] = []
    monkeypatch.setattr(loader, "offline_if_unreachable", lambda: calls.append("reachable?"))
    monkeypatch.setattr(
        "transformers.utils.peft_utils.find_adapter_config_file", lambda *_, **__: calls.append("adapter?")
    )
    assert loader.find_adapter("somebody/something") is None
    assert calls == ["reachable?", "adapter?"]


def test_a_folder_above_a_model_names_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config\.json") as caught:
        load_model(str(tmp_path), device=torch.device("cpu"), dtype=torch.float32)
    assert caught.value.hint is None
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=rf"Did you mean {tmp_path / 'run'}\?"):
        load_model(str(tmp_path), device=torch.device("cpu"), dtype=torch.float32)
