"""The held-out loss: one number whatever the packing, by hand, and without a matrix of logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.documents import random_corpus
from tests.support.tiny import tiny_llama
from tunesmith.models.attention import packed_attention
from tunesmith.models.head import CausalModel
from tunesmith.training.evaluate import held_out_loss

LENGTHS = (5, 17, 9, 30, 3, 12, 8, 21)


def _measure(corpus, documents_N, max_tokens: int) -> tuple[float, int]:
    model = tiny_llama(dtype=torch.float64)
    causal = CausalModel(model, torch.float64)
    with packed_attention(model, "sdpa"):
        measured = held_out_loss(
            causal,
            corpus,
            documents_N,
            max_tokens=max_tokens,
            autocast=torch.autocast("cpu", enabled=False),
        )
    return measured.loss, measured.tokens


def test_the_loss_does_not_depend_on_how_documents_are_grouped():
    """The mean over all supervised tokens, worked out document by document from the model's own logits."""
    corpus = random_corpus(LENGTHS)
    documents_N = np.array([0, 1, 3, 4, 6, 7])
    model = tiny_llama(dtype=torch.float64)
    summed, count = 0.0, 0
    for document in documents_N.tolist():
        source, index = corpus.locate(document)
        ids = torch.tensor(source.ids(index), dtype=torch.int64)
        trained = torch.tensor(source.trained(index))[1:]
        with torch.no_grad():
            logprob = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        summed -= float(logprob[torch.arange(len(ids) - 1), ids[1:]][trained].sum())
        count += int(trained.sum())
    tokens = int(corpus.lengths[documents_N].sum())
    for max_tokens in (1, 13, 40, 1000):
        loss, seen = _measure(corpus, documents_N, max_tokens)
        assert loss == pytest.approx(summed / count, rel=1e-6)  # sums of float32
        assert seen == tokens


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that anything returns, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_matrix_of_logits_exists(monkeypatch):
    """A chunk of the head at most, however many tokens are measured at once."""
    chunk = 2**16
    monkeypatch.setattr("tunesmith.kernels.linear_logprob.CHUNK_BYTES_CPU", 4 * chunk, raising=True)
    corpus = random_corpus((64,) * 40)
    model = tiny_llama(vocab_size=4096)
    causal = CausalModel(model, torch.float32)
    supervised = sum(int(corpus.locate(n)[0].trained(corpus.locate(n)[1])[1:].sum()) for n in range(40))
    widest = max(p.numel() for p in model.parameters())
    allowed = max(chunk, widest, 40 * 64 * model.config.intermediate_size)
    with packed_attention(model, "sdpa"), _Largest() as largest:
        held_out_loss(
            causal, corpus, np.arange(40), max_tokens=4096, autocast=torch.autocast("cpu", enabled=False)
        )
    assert supervised * 4096 > 4 * allowed, "the matrix would have been seen"
    assert largest.elements <= allowed


def test_each_micro_batch_is_told():
    model, told = tiny_llama(dtype=torch.float64), []
    with packed_attention(model, "sdpa"):
        held_out_loss(
            CausalModel(model, torch.float64),
            random_corpus(LENGTHS),
            np.arange(len(LENGTHS)),
            max_tokens=max(LENGTHS),
            autocast=torch.autocast("cpu", enabled=False),
            progress=lambda *counts: told.append(counts),
        )
    assert len(told) > 2
    assert told == [(done, len(told)) for done in range(len(told))]
