"""The last fused layer computes supervised positions only; losses and gradients are those of the whole row."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support.documents import random_corpus
from tests.support.tiny import tiny_llama
from tunesmith.contracts.batch import TokenBatch
from tunesmith.data.batches import collate
from tunesmith.models import head
from tunesmith.models.adapter import add_lora
from tunesmith.models.attention import packed_attention
from tunesmith.models.head import CausalModel
from tunesmith.models.install import install
from tunesmith.models.policy import POLICIES

LENGTHS = [9, 30, 2, 17, 1, 5]
DOUBLE = torch.float64


def _model(targets: str = "all-linear", **shape: int):
    model = add_lora(
        tiny_llama(dtype=DOUBLE, **shape), rank=8, alpha=16, dropout=0.0, targets=targets, seed=1
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    return model.to(DOUBLE)


def _batch(index: list[int]) -> TokenBatch:
    whole = collate(random_corpus(LENGTHS), list(range(len(LENGTHS))))

    rows_S = torch.tensor(index)
    targets_S = torch.arange(len(index)) % 11
    weights_S = torch.linspace(0.5, 1.5, len(index))
    return replace(
        whole,
        logit_index_S=rows_S,
        targets_S=targets_S,
        weights_S=weights_S,
        document_S=torch.zeros_like(rows_S),
    )


def _outcome(
    model, batch: TokenBatch, dtype: torch.dtype = DOUBLE
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    causal = CausalModel(model, dtype)
    with packed_attention(causal.base, "sdpa"):
        loss = causal.score(batch).cross_entropy(batch.weights_S)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach(), grads


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "index",
    [[3, 4, 10, 40, 41, 60], [60, 3, 12], [5, 5, 9], [0, 0, 0, 7], [38]],
    ids=["some", "out-of-order", "two-targets", "padding", "one"],
)
def test_losses_and_gradients_are_those_of_stock_layers(policy, index):
    batch, model = _batch(index), _model()
    stock = _outcome(model, batch)
    installed = install(model, policy=policy)
    ours = _outcome(model, batch)
    assert installed.fallbacks == {}
    assert float(ours[0]) == pytest.approx(float(stock[0]), rel=1e-6)
    assert ours[1].keys() == stock[1].keys()
    for name, grad in ours[1].items():
        assert float((grad - stock[1][name]).norm() / stock[1][name].norm()) < 1e-5, name


def test_only_wanted_rows_leave_the_last_layer():
    model = _model()
    causal = CausalModel(model, DOUBLE)
    batch = _batch([1, 2, 3])
    with packed_attention(causal.base, "sdpa"):
        assert (
            causal.hidden(batch, batch.logit_index_S).shape[0] == batch.tokens
        )  # stock layers know nothing of it
        install(model)
        picked_SD = causal.hidden(batch, batch.logit_index_S)
        whole_TD = causal.hidden(batch)
    assert picked_SD.shape[0] == 3
    torch.testing.assert_close(picked_SD, whole_TD[1:4])


def test_where_most_positions_train_the_row_stays_whole(monkeypatch):
    seen = []
    original = CausalModel.hidden
    monkeypatch.setattr(
        head.CausalModel,
        "hidden",
        lambda self, batch, rows=None: seen.append(rows) or original(self, batch, rows),
    )
    model = _model()
    install(model)
    _outcome(model, _batch(list(range(40))))
    _outcome(model, _batch(list(range(60))))
    assert [rows is None for rows in seen] == [False, True]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_on_the_gpu_errors_are_no_larger_than_those_of_stock_layers(policy, dtype):
    torch.backends.cuda.matmul.allow_tf32 = False
    shape = {"hidden_size": 256, "intermediate_size": 640, "num_attention_heads": 4, "num_key_value_heads": 2}
    batch = _batch([3, 4, 10, 40, 41, 60, 61]).to(torch.device("cuda"))
    _, exact = _outcome(_model(**shape).cuda(), batch)
    model = _model(**shape).float().cuda()
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(dtype)

    def total(grads: dict[str, torch.Tensor]) -> float:
        difference = torch.stack([(grads[name].double() - exact[name]).norm() for name in exact]).norm()
        return float(difference / torch.stack([grad.norm() for grad in exact.values()]).norm())

    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        _, stock = _outcome(model, batch, dtype)
        installed = install(model, policy=policy)
        _, ours = _outcome(model, batch, dtype)
    assert installed.fallbacks == {}
    assert total(ours) <= 1.1 * total(stock) + 1e-6
