"""NEFTune: how large the noise is and where, that evaluation has none, and that runs repeat and go on with it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.runs import build, run_settings
from tests.support.tiny import tiny_llama
from tunesmith.models.adapter import add_lora
from tunesmith.models.attention import packed_attention
from tunesmith.models.head import CausalModel
from tunesmith.models.neftune import noisy_embeddings
from tunesmith.models.probe import probe_batch

ALPHA, WIDTH = 5.0, 32
LENGTHS = (3, 60, 1, 200)


def first_inputs(model: Any, lengths: tuple[int, ...]) -> Tensor:
    """What the first layer gets of a packed row, `[T, D]`."""
    seen: list[Tensor] = []
    handle = (
        model.get_decoder()
        .layers[0]
        .register_forward_pre_hook(lambda _module, args: seen.append(args[0].detach()[0]))
    )
    with packed_attention(model, "sdpa"):
        CausalModel(model, torch.float32).hidden(probe_batch(lengths))
    handle.remove()
    return seen[0]


def noise(model: Any, lengths: tuple[int, ...] = LENGTHS, alpha: float = ALPHA) -> list[Tensor]:
    """The noise on the embeddings of each document, `[T of it, D]`."""
    plain = first_inputs(model, lengths)
    with noisy_embeddings(model.get_decoder(), alpha):
        return list((first_inputs(model, lengths) - plain).split(list(lengths)))


def test_the_noise_of_a_document_is_uniform_and_goes_by_its_own_length() -> None:
    torch.manual_seed(1)
    for found, length in zip(noise(tiny_llama().train()), LENGTHS, strict=True):
        largest = ALPHA / math.sqrt(length * WIDTH)
        assert 0.9 * largest < float(found.abs().max()) <= largest * (1 + 1e-4)
        if length > 3:  # of a uniform number in [-1, 1] the variance is 1/3; 5 standard errors of it
            error = 5 * math.sqrt(4 / 45 / found.numel())
            assert float((found / largest).var()) == pytest.approx(1 / 3, abs=error)
            assert abs(float((found / largest).mean())) < 5 * math.sqrt(1 / 3 / found.numel())


def test_each_pass_draws_anew_and_a_seed_repeats() -> None:
    model = tiny_llama().train()
    torch.manual_seed(1)
    first, second = noise(model), noise(model)
    torch.manual_seed(1)
    again = noise(model)
    assert not torch.equal(first[1], second[1])
    assert all(map(torch.equal, first, again))


def test_evaluation_has_no_noise_and_draws_nothing() -> None:
    model = tiny_llama().eval()
    before = torch.get_rng_state()
    assert all(not found.any() for found in noise(model))
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_stays_on_the_model_also_after_an_error() -> None:
    model = tiny_llama().train()
    modules = list(model.modules())
    with pytest.raises(RuntimeError, match="stop"), noisy_embeddings(model.get_decoder(), ALPHA):
        raise RuntimeError("stop")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    with noisy_embeddings(model.get_decoder(), None):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def test_an_embedding_that_is_called_alone_has_no_noise() -> None:
    """Whatever reads the table outside of a pass of the backbone gets the table."""
    model = tiny_llama().train()
    table = model.get_input_embeddings()
    with noisy_embeddings(model.get_decoder(), ALPHA):
        first_inputs(model, (5,))
        assert torch.equal(table(torch.arange(7)), table.weight[:7])


@pytest.mark.parametrize("trained", ["adapter", "everything", "embeddings"])
def test_layers_that_run_again_in_backward_see_the_same_noise(trained: str) -> None:
    def gradients(recompute: bool) -> list[Tensor]:
        model = tiny_llama()
        if trained != "everything":
            saved = ("embed_tokens",) if trained == "embeddings" else ()
            model = add_lora(
                model, rank=2, alpha=4, dropout=0.0, targets=["q_proj"], seed=0, modules_to_save=saved
            )
        causal = CausalModel(model.train(), torch.float32)
        if recompute:
            causal.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(3)
        batch = probe_batch((9, 30))
        with packed_attention(causal.base, "sdpa"), noisy_embeddings(causal.backbone, ALPHA):
            causal.score(batch).cross_entropy(batch.weights_S).backward()
        return [p.grad for p in causal.model.parameters() if p.requires_grad and p.grad is not None]

    kept, again = gradients(False), gradients(True)
    assert kept
    assert all(map(torch.equal, kept, again))


@pytest.fixture
def settings(tiny_model_dir: Path, tmp_path: Path):
    def make(**sections: Any) -> dict[str, Any]:
        return run_settings(tiny_model_dir, tmp_path, **sections)

    return make


def test_a_run_trains_with_noise_and_measures_without(settings, tmp_path: Path) -> None:
    def losses(name: str, **train: Any) -> tuple[list[float], list[float]]:
        run, events = build(settings(train={"steps": 2, **train}, output={"dir": str(tmp_path / name)}))
        with run.packed():
            run.trainer.train()
        return [e.loss for e in events.of("step")], [e.loss for e in events.of("eval")]

    (plain, plain_held), (noisy, noisy_held) = losses("plain"), losses("noisy", neftune_alpha=15.0)
    assert noisy[0] != plain[0]
    assert noisy_held[0] == plain_held[0]
    assert noisy_held[-1] != plain_held[-1]


def test_a_run_with_noise_goes_on_bit_for_bit(settings) -> None:
    made = settings(train={"steps": 4, "neftune_alpha": 5.0}, output={"save_every": 2, "resume": "auto"})
    whole, events = build(made)
    with whole.packed():
        whole.trainer.train()
    torch.manual_seed(12345)  # a resumed process starts from other random state
    rest, later = build(made)
    rest.trainer.resume(next(c for c in rest.store.all() if c.step == 2))
    with rest.packed():
        rest.trainer.train()
    assert [e.loss for e in later.of("step")] == [e.loss for e in events.of("step")][2:]
    ours, theirs = rest.backend.trained_parameters(), whole.backend.trained_parameters()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
