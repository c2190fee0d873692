"""The training truths: what the loss, the gradients and a resumed run must not depend on."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from tests.support.documents import random_corpus
from tests.support.runs import build, run_settings
from tests.support.tiny import tiny_llama
from tunesmith.data.batches import Corpus, collate
from tunesmith.distributed.single import SingleDevice
from tunesmith.models.adapter import add_lora
from tunesmith.models.attention import packed_attention
from tunesmith.models.head import CausalModel
from tunesmith.objectives.sft import SFT
from tunesmith.training.step import ObjectiveLoss, train_step

LENGTHS = [9, 30, 2, 17, 41, 5, 23, 12]


def _gradients(model, corpus: Corpus, groups: list[list[int]]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one step whose documents are grouped into micro-batches."""
    causal = CausalModel(model, next(model.parameters()).dtype)
    backend = SingleDevice(
        model, torch.optim.SGD(model.parameters(), lr=0.0), torch.device("cpu"), causal.compute_dtype
    )
    with packed_attention(causal.base, "sdpa"):
        result = backend.forward_backward([collate(corpus, g) for g in groups], ObjectiveLoss(causal, SFT))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return float(sum(result.losses)), gradients


def _error(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    difference = torch.stack([(ours[n] - theirs[n]).double().norm() for n in ours]).norm()
    return float(difference / torch.stack([theirs[n].double().norm() for n in theirs]).norm())


def _trained(kind: str, dtype: torch.dtype):
    model = tiny_llama(dtype=dtype)
    if kind == "full":
        return model
    model = add_lora(model, rank=4, alpha=8, dropout=0.0, targets="all-linear", seed=1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # B = 0 would make the gradient of A vanish
            torch.nn.init.normal_(parameter, std=0.1)
    return model.to(dtype)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
def test_loss_and_gradients_do_not_depend_on_grouping_or_packing(kind, dtype, tolerance):
    corpus = random_corpus(LENGTHS)
    model = _trained(kind, dtype)
    documents = list(range(len(LENGTHS)))
    one_by_one = [[d] for d in documents]
    reference, gradients = _gradients(model, corpus, one_by_one)
    for groups in ([documents], [documents[:3], documents[3:]], [[5, 0], [7, 6, 1], [2, 3, 4]]):
        loss, others = _gradients(model, corpus, groups)
        assert abs(loss - reference) <= tolerance * reference
        assert _error(others, gradients) <= tolerance


def test_loss_is_the_mean_over_supervised_tokens_as_stock_transformers_computes_it():
    """Padded to a rectangle with labels −100, stock transformers gives the same mean and the same gradients."""
    corpus = random_corpus(LENGTHS)
    model = tiny_llama(dtype=torch.float64)
    loss, gradients = _gradients(model, corpus, [list(range(len(LENGTHS)))])

    ids = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        source, index = corpus.locate(row)
        ids[row, :length] = torch.tensor(source.ids(index))
        mask[row, :length] = 1
        labels[row, :length][torch.tensor(source.trained(index))] = ids[row, :length][
            torch.tensor(source.trained(index))
        ]
    stock = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    stock.backward()
    assert loss == pytest.approx(stock.item(), rel=1e-6)  # the stock loss is taken in float32
    assert _error(gradients, {n: p.grad for n, p in model.named_parameters()}) < 1e-6


def test_a_step_moves_parameters_by_the_hand_computed_gradient():
    """Plain SGD with clipping: Δ = −lr · g · min(1, c / ‖g‖)."""
    corpus = random_corpus(LENGTHS)
    model = tiny_llama(dtype=torch.float64)
    _, gradients = _gradients(model, corpus, [[0, 1], [2]])
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    before = copy.deepcopy(dict(model.named_parameters()))
    causal = CausalModel(model, torch.float64)
    backend = SingleDevice(
        model, torch.optim.SGD(model.parameters(), lr=0.5), torch.device("cpu"), torch.float64
    )
    with packed_attention(model, "sdpa"):
        batches = [collate(corpus, [0, 1]), collate(corpus, [2])]
        result = train_step(backend, batches, ObjectiveLoss(causal, SFT), max_grad_norm=0.25)
    assert result.applied
    assert result.grad_norm == pytest.approx(float(norm), rel=1e-9)
    for name, parameter in model.named_parameters():
        expected = before[name] - 0.5 * gradients[name] * (0.25 / (norm + 1e-6))
        torch.testing.assert_close(parameter, expected, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize(
    ("optimizer", "weights"),
    [
        *(
            (name, "auto")
            for name in ("adamw", "adamw_8bit", "paged_adamw_8bit", "lion_8bit", "adafactor", "sgd")
        ),
        ("adamw", "bfloat16"),
        ("adamw_8bit", "bfloat16"),
    ],
)
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    optimizer, weights, tiny_model_dir: Path, tmp_path: Path
):
    """Stopped in the middle of the second epoch, with dropout on; losses, weights and held-out loss compared.

    Weights in bfloat16 are rounded stochastically.
    """
    full = weights == "bfloat16" or optimizer.endswith("8bit")

    def settings(name: str, **train) -> dict:
        (tmp_path / name).mkdir(exist_ok=True)
        return run_settings(
            tiny_model_dir,
            tmp_path / name,
            # the embedding of full fine-tuning is large enough to get 8-bit moments
            adapter={"kind": "none"} if full else {"dropout": 0.2},
            model={"dtype": weights},
            train={"optimizer": optimizer, "packing": False, "global_batch": 8, "steps": 9, **train},
            output={"save_every": 7},
        )

    whole, events = build(settings("whole"))
    with whole.packed():
        whole.trainer.train()
    losses = [event.loss for event in events.of("step")]

    part, _ = build(settings("part"))
    original = part.trainer._run_step
    part.trainer._run_step = lambda rows: (
        original(rows) if part.trainer.step < 7 else (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with part.packed(), pytest.raises(KeyboardInterrupt):
        part.trainer.train()

    torch.manual_seed(12345)  # a resumed process starts from other random state
    rest, later = build(settings("part"))
    checkpoint = rest.store.newest_intact(lambda path, reason: pytest.fail(reason))
    rest.trainer.resume(checkpoint)
    assert rest.trainer.step == 7
    assert 0 < rest.trainer.position.step_in_epoch < 5
    assert rest.trainer.position.epoch == 1
    with rest.packed():
        outcome = rest.trainer.train()

    assert [event.loss for event in later.of("step")] == losses[7:]
    assert outcome.last_eval == events.of("eval")[-1].loss
    finished = whole.backend.trained_parameters()
    if weights != "auto":
        assert {parameter.dtype for parameter in finished.values()} == {torch.bfloat16}
    for name, parameter in rest.backend.trained_parameters().items():
        assert torch.equal(parameter, finished[name]), name


def test_recomputing_layers_changes_nothing(tiny_model_dir: Path, tmp_path: Path):
    losses = {}
    for policy in ("keep", "recompute"):
        (tmp_path / policy).mkdir()
        run, events = build(
            run_settings(
                tiny_model_dir, tmp_path / policy, adapter={"dropout": 0.1}, memory={"policy": policy}
            )
        )
        assert run.fit.policy == policy
        with run.packed():
            run.trainer.train()
        losses[policy] = [event.loss for event in events.of("step")]
    assert losses["keep"] == losses["recompute"]


@pytest.mark.parametrize("micro_batch", [1, 3, 4])
def test_micro_batch_changes_speed_only(micro_batch, tiny_model_dir: Path, tmp_path: Path):
    losses = {}
    for name, value in (("auto", "auto"), ("fixed", micro_batch)):
        (tmp_path / name).mkdir()
        settings = run_settings(
            tiny_model_dir, tmp_path / name, train={"micro_batch": value, "packing": False}
        )
        run, events = build(settings)
        with run.packed():
            run.trainer.train()
        losses[name] = [event.loss for event in events.of("step")]
    assert losses["fixed"] == pytest.approx(losses["auto"], rel=1e-5)
