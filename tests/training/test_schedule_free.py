"""Schedule-free AdamW: what is measured is the average of the steps, and measuring leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tunesmith.training.optim import Schedule, build_optimizer

pytest.importorskip("schedulefree", reason="schedulefree is in the extra `optimizers`")

BETA = 0.9


def made(warmup: float = 0.0) -> tuple[nn.Linear, torch.optim.Optimizer, Schedule]:
    torch.manual_seed(0)
    model = nn.Linear(3, 5)
    optimizer = build_optimizer(
        "schedule_free_adamw", model, learning_rate=0.1, weight_decay=0.0, betas=(BETA, 0.99)
    )
    return model, optimizer, Schedule("constant", learning_rate=0.1, warmup=warmup, total_steps=10)


def step(model: nn.Linear, optimizer: torch.optim.Optimizer, schedule: Schedule, number: int) -> torch.Tensor:
    """One step, away from where the weights are; returns z after it."""
    schedule.apply(optimizer, number)
    for parameter in model.parameters():
        parameter.grad = parameter.detach() + number
    optimizer.step()
    return optimizer.state[model.weight]["z"].clone()


@pytest.mark.parametrize("warmup", [0.0, 3.0])
def test_the_measured_point_is_the_average_of_the_steps_by_their_rate(warmup: float) -> None:
    """x is the mean of all z, each weighted by the square of the largest rate so far; y is 0.9 x + 0.1 z."""
    model, optimizer, schedule = made(warmup)
    points = [step(model, optimizer, schedule, number) for number in range(6)]
    weights = torch.tensor([max(schedule.at(s) for s in range(n + 1)) ** 2 for n in range(6)])
    average = (torch.stack(points) * weights[:, None, None]).sum(0) / weights.sum()
    # the average is worked out from y in float32, a tenth of whose last place counts tenfold
    with optimizer.measuring():
        torch.testing.assert_close(model.weight.detach(), average, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        model.weight.detach(), BETA * average + (1 - BETA) * points[-1], rtol=1e-5, atol=1e-6
    )


def test_measuring_leaves_every_bit_also_after_an_error_and_within_itself() -> None:
    model, optimizer, schedule = made()
    step(model, optimizer, schedule, 0)
    step(model, optimizer, schedule, 1)
    before = model.weight.detach().clone()
    with optimizer.measuring(), optimizer.measuring():
        inner = model.weight.detach().clone()
        assert not torch.equal(inner, before)
    assert torch.equal(model.weight, before)

    def failing() -> None:
        with optimizer.measuring():
            raise RuntimeError("the evaluation failed")

    with pytest.raises(RuntimeError, match="failed"):
        failing()
    assert torch.equal(model.weight, before)
    step(model, optimizer, schedule, 2)


def test_before_the_first_step_there_is_one_point() -> None:
    model, optimizer, schedule = made()
    before = model.weight.detach().clone()
    with optimizer.measuring():
        assert torch.equal(model.weight, before)
    step(model, optimizer, schedule, 0)


def test_no_checkpoint_is_written_of_the_measured_point() -> None:
    model, optimizer, schedule = made()
    step(model, optimizer, schedule, 0)
    with optimizer.measuring(), pytest.raises(AssertionError):
        optimizer.state_dict()
    assert optimizer.state_dict()["param_groups"][0]["train_mode"]
