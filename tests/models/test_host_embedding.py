"""An input embedding on the host: the same numbers, names and files, less of the GPU, and what has to stay there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.support.documents import random_corpus
from tests.support.runs import build, run_settings
from tests.support.tiny import save_tiny_model, tiny_llama, tiny_tokenizer
from tunesmith.config import summary
from tunesmith.data.batches import collate
from tunesmith.distributed.single import SingleDevice
from tunesmith.export.merged import save_merged
from tunesmith.kernels import launch
from tunesmith.kernels.gather_rows import gather_rows
from tunesmith.models import host_embedding
from tunesmith.models.adapter import add_lora
from tunesmith.models.attention import packed_attention
from tunesmith.models.door import open_door
from tunesmith.models.generate import Sampling, Stop, generate
from tunesmith.models.head import CausalModel
from tunesmith.models.host_embedding import NotMovableError, move_embedding_to_host, reason_to_stay
from tunesmith.models.host_memory import NoHostMemoryError, pinned_copy
from tunesmith.models.install import install
from tunesmith.models.neftune import noisy_embeddings
from tunesmith.objectives.sft import SFT
from tunesmith.training.step import ObjectiveLoss, train_step

LENGTHS = [9, 30, 2, 17, 41, 5]
STEPS = [[[0, 1], [2]], [[3, 4], [5]], [[0, 1], [2]], [[0, 1], [2]]]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
KEY = "model.embed_tokens.weight"


def untied(device: str = "cpu", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    model = tiny_llama(seed=4, dtype=dtype, tie_word_embeddings=False, initializer_range=0.3, **changes)
    return model.requires_grad_(False).to(device)


def adapted(device: str = "cpu", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """With a LoRA adapter whose B is not zero."""
    model: Any = add_lora(untied(), rank=3, alpha=6.0, dropout=0.0, targets="all-linear", seed=1, **options)
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.to(device, dtype)


def ids_on(device: str) -> Tensor:
    return torch.tensor([[5, 0, 383, 7, 7], [1, 2, 3, 4, 5]], device=device)


def logits(model: Any, device: str) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids_on(device)).logits
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("adapter", [False, True])
def test_it_computes_the_same_and_comes_back(device: str, adapter: bool) -> None:
    model = adapted(device) if adapter else untied(device)
    before, state = logits(model, device), {name: value.clone() for name, value in model.state_dict().items()}
    embedding = model.get_input_embeddings()
    weight = embedding.weight
    moved = move_embedding_to_host(model)

    assert torch.equal(logits(model, device), before)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value.to(device), state[name]) for name, value in model.state_dict().items())
    assert model.get_input_embeddings() is embedding
    assert embedding.weight.device.type == "cpu"
    assert embedding.weight.is_pinned() == (device == "cuda")
    assert not embedding.weight.requires_grad
    assert (moved.bytes, moved.elements) == (384 * 32 * 4, 384 * 32)
    assert embedding(ids_on(device)[:, :0]).shape == (2, 0, 32)
    assert embedding(ids_on(device).int()).shape == (2, 5, 32)

    for _ in range(2):
        moved.undo()
        assert embedding.weight is weight
        assert weight.device.type == device
        assert "forward" not in vars(embedding)
        assert not embedding._buffers
        assert torch.equal(logits(model, device), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_its_rows_are_read_by_the_kernel_and_not_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU both could read it."""
    read: list[tuple[int, ...]] = []

    def counted(table_VD: Tensor, ids_N: Tensor) -> Tensor:
        read.append((*table_VD.shape, *ids_N.shape))
        return gather_rows(table_VD, ids_N)

    monkeypatch.setattr(host_embedding, "gather_rows_op", counted)
    model = untied()
    moved = move_embedding_to_host(model)
    logits(model, "cpu")
    assert read == [(384, 32, 10)]
    moved.undo()
    logits(model, "cpu")
    assert len(read) == 1


@pytest.mark.parametrize("adapter", [False, True])
def test_the_first_parameter_tells_the_device_of_the_model(adapter: bool) -> None:
    """By it generation moves its inputs; the embedding, which would be it, is none while it is on the host."""
    model = adapted() if adapter else untied()
    assert next(name for name, _ in model.named_parameters()).endswith("embed_tokens.weight")
    moved = move_embedding_to_host(model)
    assert not any("embed_tokens" in name for name, _ in model.named_parameters())
    moved.undo()
    assert next(name for name, _ in model.named_parameters()).endswith("embed_tokens.weight")


def train(
    model: Any, device: str, attention: str = "sdpa", *, graphs: bool = False, alpha: float | None = None
) -> tuple[list[float], list[Tensor], Any]:
    """Losses of some steps, and the parameters that they end with."""
    dtype = next(model.parameters()).dtype
    causal = CausalModel(model.train(), dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    backend = SingleDevice(model, optimizer, torch.device(device), dtype, graphs=graphs)
    loss, corpus = ObjectiveLoss(causal, SFT), random_corpus(LENGTHS)
    torch.manual_seed(3)
    with packed_attention(causal.base, attention), noisy_embeddings(causal.backbone, alpha):
        losses = [
            train_step(backend, [collate(corpus, g) for g in groups], loss, max_grad_norm=0.5).loss
            for groups in STEPS
        ]
    return losses, [p.detach().clone() for p in trained], backend


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "stock"])
@pytest.mark.parametrize("alpha", [None, 5.0], ids=["plain", "neftune"])
def test_training_is_the_same_bit_for_bit(device: str, fused: bool, alpha: float | None) -> None:
    results = []
    for on_host in (False, True):
        model = adapted(device)
        if fused:
            install(model).set_embedding_on_host(on_host)
        elif on_host:
            move_embedding_to_host(model)
        assert (KEY not in dict(model.get_base_model().named_parameters())) == on_host
        results.append(train(model, device, alpha=alpha))
    (losses, parameters, _), (ours, our_parameters, _) = results
    assert ours == losses
    assert len(set(losses)) > 2
    assert all(map(torch.equal, our_parameters, parameters))


def test_what_asks_for_gradients_of_the_embeddings_gets_them() -> None:
    """transformers does so for checkpointing, with a hook on the embedding."""
    model = untied()
    model.enable_input_require_grads()
    move_embedding_to_host(model)
    assert model.get_input_embeddings()(ids_on("cpu")).requires_grad


@pytest.mark.parametrize("device", DEVICES)
def test_it_answers_the_same(device: str) -> None:
    model = adapted(device)
    prompts, options = [[5, 6, 7], [20, 21, 22, 23, 24]], {"sampling": Sampling(12), "stop": Stop()}
    expected = generate(model, tiny_tokenizer(), prompts, **options)
    install(model).set_embedding_on_host(True)
    assert model.device.type == device
    assert generate(model, tiny_tokenizer(), prompts, **options) == expected
    assert model.generate(input_ids=ids_on(device), max_new_tokens=4).shape == (2, 9)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        file.name: file.read_bytes() for file in folder.iterdir() if file.suffix in (".safetensors", ".json")
    }


WRITERS: dict[str, Callable[[Any, Path], None]] = {
    "model": lambda model, folder: model.get_base_model().save_pretrained(folder),
    "adapter": lambda model, folder: model.save_pretrained(folder),
    "merged": lambda model, folder: save_merged(model, folder, torch.float32),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("writer", WRITERS)
def test_what_is_written_is_the_same(device: str, writer: str, tmp_path: Path) -> None:
    model = adapted(device)
    WRITERS[writer](model, tmp_path / "before")
    move_embedding_to_host(model)
    WRITERS[writer](model, tmp_path / "after")
    assert files_of(tmp_path / "after") == files_of(tmp_path / "before")
    assert files_of(tmp_path / "after")


@pytest.mark.parametrize("device", DEVICES)
def test_files_load_with_the_table_on_the_host(device: str, tmp_path: Path) -> None:
    model = untied(device)
    before = logits(model, device)
    moved = move_embedding_to_host(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device), device), before
    )
    other = untied(device)
    other.load_state_dict({name: torch.zeros_like(value) for name, value in other.state_dict().items()})
    move_embedding_to_host(other)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, device), before)
    moved.undo()


def test_a_full_model_with_a_frozen_embedding_trains() -> None:
    model = untied()
    model.lm_head.requires_grad_(True)
    install(model).set_embedding_on_host(True)
    losses, (head,), _ = train(model, "cpu")
    assert losses[-1] < losses[0]
    assert torch.equal(head, model.lm_head.weight)


def test_what_install_says_and_takes_back() -> None:
    model = adapted()
    installed = install(model)
    installed.set_embedding_on_host(True)
    moved = installed.embedding
    installed.set_embedding_on_host(True)
    assert installed.embedding is moved
    assert installed.table()[-1] == ("input embedding", "on the host", "0.00 GiB pinned")
    assert installed.recordable() is None
    assert moved is not None
    assert installed.host_bytes == moved.bytes
    installed.undo()
    assert installed.embedding is None
    assert installed.host_bytes == 0
    assert isinstance(model.get_input_embeddings().weight, nn.Parameter)
    assert len(installed.table()) == 1


@pytest.mark.parametrize("device", DEVICES)
def test_a_copy_of_the_model_has_a_table_of_its_own(device: str) -> None:
    model = untied(device)
    expected = logits(model, device)
    move_embedding_to_host(model)
    other = copy.deepcopy(model)
    model.get_input_embeddings().weight.zero_()
    assert torch.equal(logits(other, device), expected)
    assert not torch.equal(logits(model, device), expected)


def test_a_run_counts_its_parameters_all_the_same(tmp_path: Path) -> None:
    settings = run_settings(save_tiny_model(tmp_path / "model", tie_word_embeddings=False), tmp_path)
    run, _ = build(settings)
    run = replace(run, installed=install(run.causal.model))
    assert run.installed is not None
    expected = summary._model_line(run)
    run.installed.set_embedding_on_host(True)
    assert summary._model_line(run) == expected


# ---------------------------------------------------------------------- what has to stay


class Scaled(nn.Embedding):
    """As some families have it."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input) * 2


def _scaled() -> Any:
    model = untied()
    model.set_input_embeddings(Scaled(384, 32).requires_grad_(False))
    return model


def _peft(**options: Any) -> Any:
    return get_peft_model(untied(), LoraConfig(r=2, target_modules=["q_proj"], **options))


def _changed(change: Callable[[Any, Any], object], model: Any | None = None) -> Any:
    model = untied() if model is None else model
    change(model, model.get_input_embeddings())
    return model


def _tie_apart(model: Any, embedding: Any) -> None:
    model.lm_head.weight = nn.Parameter(embedding.weight.detach(), requires_grad=False)


def _in_4_bits(_: Any, embedding: Any) -> None:
    import bitsandbytes

    embedding.weight = bitsandbytes.nn.Params4bit(embedding.weight.detach(), requires_grad=False)


STAYS: dict[str, tuple[Callable[[], Any], str]] = {
    "trains": (lambda: _changed(lambda _, e: e.requires_grad_(True)), "the input embedding trains"),
    "tied": (lambda: tiny_llama().requires_grad_(False), "shares its memory with lm_head.weight"),
    "one storage": (lambda: _changed(_tie_apart), "shares its memory with lm_head.weight"),
    "tied, the head apart": (
        lambda: get_peft_model(
            tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
        ),
        "shares its memory with lm_head.original_module.weight",
    ),
    "adapter": (
        lambda: get_peft_model(untied(), LoraConfig(r=2, target_modules=["embed_tokens"])),
        "an adapter sits on the input embedding",
    ),
    "whole": (lambda: _peft(modules_to_save=["embed_tokens"]), "trains beside the adapter"),
    "rows": (
        lambda: _peft(trainable_token_indices={"embed_tokens": [5]}),
        "rows of the input embedding train",
    ),
    "max_norm": (lambda: _changed(lambda _, e: setattr(e, "max_norm", 1.0)), "max_norm"),
    "scaled": (_scaled, "is a Scaled, which computes more"),
    "replaced": (
        lambda: _changed(lambda _, e: setattr(e, "forward", e.forward)),
        "something else computes the input embedding already",
    ),
    "in 4 bits": (lambda: _changed(_in_4_bits), "is a Params4bit"),
    "no weights": (lambda: untied().to("meta"), "on the device meta"),
    "not gathered": (
        lambda: _changed(lambda _, e: setattr(e.weight, "data", torch.empty(0))),
        "not gathered",
    ),
}


@pytest.mark.parametrize("case", STAYS)
def test_an_embedding_that_has_to_stay(case: str) -> None:
    make, reason = STAYS[case]
    model = make()
    found = reason_to_stay(model)
    assert found is not None
    assert reason in found
    with pytest.raises(NotMovableError) as caught:
        install(model).set_embedding_on_host(True)
    assert str(caught.value) == found
    assert not model.get_input_embeddings()._buffers


def test_what_concerns_gradients_alone_is_no_reason() -> None:
    model = _changed(lambda _, e: (setattr(e, "sparse", True), setattr(e, "padding_idx", 0)))
    expected = logits(model, "cpu")
    move_embedding_to_host(model)
    assert torch.equal(logits(model, "cpu"), expected)


def test_it_is_not_moved_twice() -> None:
    model = untied()
    moved = move_embedding_to_host(model)
    with pytest.raises(NotMovableError):
        move_embedding_to_host(model)
    moved.undo()
    assert reason_to_stay(model) is None


def test_without_memory_to_pin_the_model_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(_: Tensor) -> Tensor:
        raise NoHostMemoryError("cannot be pinned")

    monkeypatch.setattr(host_embedding, "pinned_copy", none_left)
    model = untied()
    embedding, expected = model.get_input_embeddings(), logits(model, "cpu")
    with pytest.raises(NoHostMemoryError, match="cannot be pinned"):
        install(model).set_embedding_on_host(True)
    assert isinstance(embedding.weight, nn.Parameter)
    assert "forward" not in vars(embedding)
    assert torch.equal(logits(model, "cpu"), expected)


def test_an_adapter_of_the_host_model_loads_on_a_stock_one(tmp_path: Path) -> None:
    model = adapted()
    expected = logits(model, "cpu")
    move_embedding_to_host(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(untied(), str(tmp_path)), "cpu"), expected)


# ---------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
def test_the_gpu_is_free_of_the_table_and_the_host_of_it_after_undo() -> None:
    model = untied("cuda", torch.bfloat16, vocab_size=50_000, hidden_size=512)
    size = 50_000 * 512 * 2
    before = torch.cuda.memory_allocated()
    moved = move_embedding_to_host(model)
    assert torch.cuda.memory_allocated() == before - size
    assert moved.bytes == size
    table = model.get_input_embeddings().weight
    assert table.is_pinned()
    assert table.untyped_storage().nbytes() == size
    view = table.detach()  # of the same memory, which it keeps
    del table
    moved.undo()
    assert torch.cuda.memory_allocated() == before
    assert not view.is_pinned()


@pytest.mark.gpu
def test_a_pinned_copy_is_one_to_the_bit_and_of_its_own_size() -> None:
    value = torch.randn(333, 100, device="cuda").T
    host = pinned_copy(value)
    assert host.is_pinned()
    assert host.is_contiguous()
    assert torch.equal(host, value.cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_training_in_cuda_graphs_is_the_same_bit_for_bit(dtype: torch.dtype) -> None:
    results = []
    for on_host in (False, True):
        model = adapted("cuda", dtype)
        install(model).set_embedding_on_host(on_host)
        attention = "varlen" if dtype == torch.bfloat16 else "sdpa"
        losses, parameters, backend = train(model, "cuda", attention, graphs=True)
        assert backend._graphs is not None
        assert backend._graphs[1].recorded >= 1
        results.append((losses, parameters))
    assert results[0][0] == results[1][0]
    assert all(map(torch.equal, results[0][1], results[1][1]))


@pytest.mark.gpu
def test_the_door_opens_before_a_table_on_the_host() -> None:
    model = adapted("cuda", torch.bfloat16)
    moved = move_embedding_to_host(model)
    door = open_door(model, attention="varlen")
    assert door.shut is None
    door.undo()
    moved.undo()


@pytest.mark.gpu
def test_a_model_that_is_moved_takes_its_table_along() -> None:
    model = untied("cuda")
    expected = logits(model, "cuda")
    moved = move_embedding_to_host(model)
    model.cuda()
    assert model.get_input_embeddings().weight.is_cuda
    assert torch.equal(logits(model, "cuda"), expected)
    moved.undo()
    assert torch.equal(logits(model, "cuda"), expected)


@pytest.mark.gpu
def test_a_kernel_that_is_wrong_on_this_card_keeps_the_table_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reason_to_stay(untied("cuda")) is None
    assert reason_to_stay(untied("cuda", torch.float64)) == "no kernel reads an input embedding in float64"
    monkeypatch.setattr(launch, "switched_off", {"gather_rows"})
    assert reason_to_stay(untied("cuda")) == "the kernel that reads its rows does not work here"
