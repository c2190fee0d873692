"""Moments in 8 bits and weights in bfloat16 over many steps: what they lose, what they keep, and resuming them.

What needs the kernels is marked `gpu` and runs on a card; `test_in_the_interpreter` runs the same tests on the CPU,
in a process that imports the kernels with Triton's interpreter switched on.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.kernels.compare import count_launches
from tests.support.interpreter import run_in_interpreter
from tests.support.tiny import tiny_llama
from tunesmith.contracts.errors import UserError
from tunesmith.kernels import launch
from tunesmith.kernels.adamw_8bit import decode, scales_of
from tunesmith.training.checkpoint import CheckpointStore
from tunesmith.training.fused_adamw import FusedAdamW
from tunesmith.training.fused_adamw_8bit import SMALL, FusedAdamW8bit
from tunesmith.training.optim import build_optimizer
from tunesmith.training.state import join_state, split_state

DEVICE = torch.device("cpu" if launch.INTERPRETED else "cuda")
CPU = torch.device("cpu")
on_kernels = (lambda test: test) if launch.INTERPRETED else pytest.mark.gpu
on_cpu = pytest.mark.skipif(launch.INTERPRETED, reason="in the interpreter the kernels compute on the CPU")

SHAPES = ((7,), (65, 64), (SMALL,), (SMALL - 1,), (3, 0))
OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that run."""
    return count_launches(monkeypatch)


def parameters_of(dtypes: Sequence[torch.dtype], device: torch.device = DEVICE) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(shape, generator=generator).to(device, dtypes[index % len(dtypes)]))
        for index, shape in enumerate(SHAPES)
    ]


def groups_of(parameters: Sequence[Tensor]) -> list[dict[str, object]]:
    return [
        {"params": list(parameters[:2]), "weight_decay": 0.1},
        {"params": list(parameters[2:]), "weight_decay": 0.0, "lr": 3e-3},
    ]


def clipped_step(optimizer: FusedAdamW, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)
    norm = optimizer.clip_in_step(50.0)
    optimizer.step()
    optimizer.zero_grad()
    return norm


def bits(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of every parameter and every state."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = [t for p in parameters for t in optimizer.state[p].values()]
    return [tensor.detach().clone() for tensor in [*parameters, *states]]


def same_bits(ours: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(ours) == len(others) and all(
        one.dtype == other.dtype and torch.equal(one, other) for one, other in zip(ours, others, strict=True)
    )


@pytest.mark.skipif(launch.INTERPRETED, reason="this is what the test starts")
def test_in_the_interpreter():
    pytest.importorskip("triton")
    assert "1 deselected" in run_in_interpreter(Path(__file__)), "the CUDA graph alone needs a card"


# ---------------------------------------------------------------------- with the kernels


@on_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [FusedAdamW, FusedAdamW8bit])
def test_kernels_and_reference_make_the_same_steps(kind, dtype, launches, monkeypatch):
    """Also where they take turns: the canary switches a kernel off, and the reference goes on with its state."""
    monkeypatch.setattr(launch, "switched_off", set())
    parameters, twins = parameters_of((dtype,)), parameters_of((dtype,))
    ours, theirs = (kind(groups_of(p), **OPTIONS) for p in (parameters, twins))
    for step in range(4):
        launch.switched_off.clear()
        norm = clipped_step(ours, step)
        if step % 2:
            launch.switched_off.add(kind.kernels[-1])
            launches.clear()
        assert float(clipped_step(theirs, step)) == pytest.approx(float(norm), rel=1e-6)
        assert not step % 2 or launches == []
    for one, other in zip(parameters, twins, strict=True):
        if dtype == torch.float32:
            # a code that fell to the other side moves one element by a hundredth of one step
            torch.testing.assert_close(one, other, rtol=0, atol=1e-3)
            assert one.numel() == 0 or float((one - other).detach().abs().mean()) < 1e-6
        else:
            assert float((one != other).sum()) <= one.numel() / 100
    first_moment = list(ours.state[parameters[1]].values())[1]
    assert first_moment.dtype == (torch.uint8 if kind is FusedAdamW8bit else torch.float32)


@on_kernels
def test_launches_do_not_grow_with_the_number_of_tensors(launches):
    optimizer = FusedAdamW8bit(groups_of(parameters_of((torch.bfloat16,))), **OPTIONS)
    clipped_step(optimizer, 0)
    assert launches == [
        *["_norm_kernel"] * 2,
        "_clip_kernel",
        *["_advance_kernel", "_update_8bit_kernel", "_advance_kernel", "_update_kernel"],
    ]


@on_kernels
@pytest.mark.parametrize("fault", ["found_inf", "nan"])
def test_a_skipped_step_changes_no_bit_and_does_not_count(fault):
    optimizer = FusedAdamW8bit(groups_of(parameters_of((torch.float32, torch.bfloat16))), **OPTIONS)
    clipped_step(optimizer, 0)
    before = bits(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    if fault == "found_inf":
        optimizer.found_inf = torch.ones((), device=DEVICE)
    else:
        parameters[0].grad[3] = float("nan")
    optimizer.clip_in_step(1.0)
    optimizer.step()
    assert same_bits(bits(optimizer), before)


@pytest.mark.gpu
def test_no_host_synchronisation_and_a_graph_replays_the_step():
    parameters = parameters_of((torch.float32, torch.bfloat16))
    twins = copy.deepcopy(parameters)
    ours, eager = (FusedAdamW8bit(groups_of(p), **OPTIONS) for p in (parameters, twins))
    for parameter, twin in zip(parameters, twins, strict=True):
        parameter.grad = torch.randn_like(parameter)
        twin.grad = parameter.grad.clone()
    for optimizer in (ours, eager):
        optimizer.clip_in_step(1.0)
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.clip_in_step(1.0)
        ours.step()
    for _ in range(3):
        torch.cuda.set_sync_debug_mode("error")
        try:
            ours.refresh()
            graph.replay()
            eager.clip_in_step(1.0)
            eager.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert same_bits(bits(ours), bits(eager))


# ---------------------------------------------------------------------- state


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16,), (torch.float32, torch.bfloat16)], ids=["bf16", "mixed"]
)
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_a_resumed_run_repeats_every_bit(name, dtypes, tmp_path):
    """Through a checkpoint on the disk, with stochastic rounding and states of three types."""
    kind = {"adamw": FusedAdamW, "adamw_8bit": FusedAdamW8bit}[name]
    whole = kind(groups_of(parameters_of(dtypes, CPU)), **OPTIONS)
    for step in range(4):
        clipped_step(whole, step)
    first = kind(groups_of(parameters_of(dtypes, CPU)), **OPTIONS)
    for step in range(2):
        clipped_step(first, step)
    parameters = [p for group in first.param_groups for p in group["params"]]
    tensors, skeleton = split_state("optimizer", first.state_dict())
    weights = {f"model/{index}": p.detach() for index, p in enumerate(parameters)}
    saved = CheckpointStore(tmp_path, keep=1).save(
        2, {**weights, **tensors}, json.loads(json.dumps({"optimizer": skeleton})), metric=None
    )
    loaded = saved.tensors()
    twins = [nn.Parameter(loaded[f"model/{index}"]) for index in range(len(parameters))]
    resumed = kind(groups_of(twins), **OPTIONS)
    resumed.load_state_dict(join_state("optimizer", loaded, saved.state()["optimizer"]))
    for step in range(2, 4):
        clipped_step(resumed, step)
    assert same_bits(bits(resumed), bits(whole))


def test_bytes_of_the_state():
    """Large tensors take two bytes an element and a scale for 256; small ones eight, as ever."""
    parameters = parameters_of((torch.bfloat16,), CPU)
    optimizer = FusedAdamW8bit(groups_of(parameters), **OPTIONS)
    clipped_step(optimizer, 0)
    for parameter in parameters:
        taken = sum(t.nbytes for name, t in optimizer.state[parameter].items() if name != "step")
        size = parameter.numel()
        assert taken == (8 * size if size < SMALL else 2 * size + 8 * scales_of(size))


def test_the_state_of_bitsandbytes_is_refused():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    parameter = nn.Parameter(torch.randn(SMALL))
    theirs = bitsandbytes.optim.AdamW8bit([parameter])
    parameter.grad = torch.ones(SMALL)
    theirs.step()
    with pytest.raises(UserError, match="another optimizer wrote it"):
        FusedAdamW8bit([parameter]).load_state_dict(theirs.state_dict())


def test_clearing_the_gradients_and_a_missing_one():
    parameters = parameters_of((torch.bfloat16,), CPU)
    optimizer = FusedAdamW8bit(groups_of(parameters), **OPTIONS)
    optimizer.step()
    assert not optimizer.state
    resting = parameters[1].detach().clone()
    parameters[2].grad = torch.ones_like(parameters[2])
    optimizer.step()
    assert torch.equal(parameters[1], resting)
    assert list(optimizer.state) == [parameters[2]]


@on_cpu
def test_the_words_of_a_parameter_do_not_depend_on_the_others():
    """A parameter whose neighbour has no gradient is rounded as if it had."""
    ends = []
    for alone in (False, True):
        parameters = parameters_of((torch.bfloat16,), CPU)
        optimizer = FusedAdamW8bit(parameters, **OPTIONS)
        for index, parameter in enumerate(parameters):
            parameter.grad = None if alone and index != 2 else torch.full_like(parameter, 0.01)
        optimizer.step()
        ends.append(parameters[2].detach().clone())
    assert torch.equal(*ends)


# ---------------------------------------------------------------------- what is lost


def drift(kind: Callable[..., torch.optim.Optimizer], dtype: torch.dtype, **options: Any) -> Tensor:
    """How far 8,192 weights of size 1 to 2 go in 40 steps whose gradients have one sign: 1e-5 a step."""
    generator = torch.Generator().manual_seed(3)
    start = (1 + torch.rand(64, 128, generator=generator)).bfloat16()
    signs = torch.randint(0, 2, start.shape, generator=generator) * 2.0 - 1.0
    parameter = nn.Parameter(start.to(dtype, copy=True))
    optimizer = kind([parameter], lr=1e-5, betas=(0.9, 0.999), eps=1e-12, weight_decay=0.0, **options)
    for _ in range(40):
        size = 0.5 + torch.rand(start.shape, generator=generator)
        parameter.grad = (signs * size).to(dtype)
        optimizer.step()
    return ((parameter.detach().float() - start.float()) * -signs).double()


@on_cpu
@pytest.mark.parametrize("kind", [FusedAdamW, FusedAdamW8bit])
def test_steps_below_half_a_unit_add_up_as_in_float32(kind):
    """A step of 1e-5 is 1/780 of the unit of a weight between 1 and 2 (2⁻⁷). Rounded to the nearest no weight ever
    moves. Rounded stochastically a weight has moved by a whole unit or not at all; the mean over 8,192 weights is
    that of float32, within five standard errors."""
    exact = drift(FusedAdamW, torch.float32)
    ours = drift(kind, torch.bfloat16)
    nearest = drift(torch.optim.AdamW, torch.bfloat16)
    standard_error = float(ours.std()) / ours.numel() ** 0.5
    assert float(exact.mean()) > 10 * standard_error, "or the test could not tell"
    assert abs(float(ours.mean() - exact.mean())) < 5 * standard_error
    assert abs(float(nearest.mean() - exact.mean())) > 10 * standard_error


@on_cpu
def test_updates_from_8_bits_are_those_of_float32_but_for_noise():
    """Gradients of known size, in blocks whose sizes spread over two decades: after 300 steps each update is off by
    less than a sixth of itself in the norm, and by no more than 3% in its mean size."""
    generator = torch.Generator().manual_seed(1)
    scale = 10 ** torch.empty(64, 256).uniform_(-1, 1, generator=generator)
    mean = 0.3 * scale * torch.randn(64, 256, generator=generator)
    start = torch.zeros(64, 256)
    ours, exact = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = [FusedAdamW8bit([ours], lr=1e-3), FusedAdamW([exact], lr=1e-3)]
    for step in range(300):
        gradient = mean + scale * torch.randn(64, 256, generator=generator)
        if step == 299:
            before = [p.detach().clone() for p in (ours, exact)]
        for parameter, optimizer in zip((ours, exact), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    one, other = (p.detach() - old for p, old in zip((ours, exact), before, strict=True))
    assert float((one - other).norm() / other.norm()) < 1 / 6
    assert float(one.abs().mean() / other.abs().mean()) == pytest.approx(1.0, abs=0.03)
    state = optimizers[0].state[ours]
    root = decode(state["root_code"].view(-1), state["root_scale"], signed=False).view(64, 256)
    exact_root = optimizers[1].state[exact]["exp_avg_sq"].sqrt()
    assert float((root / exact_root).mean()) == pytest.approx(1.0, abs=0.01)


def final_loss(name: str, dtype: torch.dtype) -> tuple[float, float]:
    """First loss, and mean of the last ten of 60 steps of a tiny llama over eight rows of tokens."""
    model = tiny_llama(dtype=dtype)
    rows = torch.randint(0, model.config.vocab_size, (8, 24), generator=torch.Generator().manual_seed(0))
    optimizer = build_optimizer(name, model, learning_rate=3e-3, weight_decay=0.01, betas=(0.9, 0.95))
    losses = []
    for _ in range(60):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses[0], sum(losses[-10:]) / 10


@on_cpu
def test_a_model_learns_as_with_adamw():
    """Final losses within 1% of the way that AdamW in float32 goes."""
    first, exact = final_loss("adamw", torch.float32)
    assert exact < first / 2
    for dtype in (torch.float32, torch.bfloat16):
        assert abs(final_loss("adamw_8bit", dtype)[1] - exact) < 0.01 * (first - exact), dtype
