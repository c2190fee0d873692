"""`FusedAdamW` against torch's AdamW: many steps, skipped ones, state dicts both ways, and where torch computes.

What needs the kernels is marked `gpu` and runs on a card; `test_in_the_interpreter` runs the same tests on the CPU,
in a process that imports the kernels with Triton's interpreter switched on.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.kernels.compare import count_launches
from tests.support.interpreter import run_in_interpreter
from tunesmith.kernels import launch
from tunesmith.training import fused_adamw
from tunesmith.training.fused_adamw import FusedAdamW, fits
from tunesmith.training.optim import build_optimizer

DEVICE = torch.device("cpu" if launch.INTERPRETED else "cuda")
on_kernels = (lambda test: test) if launch.INTERPRETED else pytest.mark.gpu

SHAPES = ((1,), (7,), (513,), (48, 96), (3, 0), (2, 1024))
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8}
# Relative to the whole parameter. float32: a step of 1e-2 rounds at 2^-24 of a value near 1, a few times. bfloat16
# keeps 8 bits of parameters and moments at each of the steps, and the interpreter truncates where a card rounds.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 3e-2 if launch.INTERPRETED else 1e-2}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that run."""
    return count_launches(monkeypatch)


def parameters_of(dtypes: Sequence[torch.dtype], seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE, dtypes[index % len(dtypes)]))
        for index, shape in enumerate(SHAPES)
    ]


def groups_of(parameters: Sequence[Tensor]) -> list[dict[str, object]]:
    return [
        {"params": list(parameters[:3]), "weight_decay": 0.1},
        {"params": list(parameters[3:]), "weight_decay": 0.0, "lr": 3e-3},
    ]


def gradients_of(parameters: Sequence[Tensor], step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    size = 10.0 ** (step - 2)  # from far below the clipping norm to far above it
    return [(torch.randn(p.shape, generator=generator) * size).to(p) for p in parameters]


def doubled(parameters: Sequence[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(parameter.detach().double().cpu()) for parameter in parameters]


def exact_step(
    exact: torch.optim.Optimizer, parameters: Sequence[Tensor], gradients: Sequence[Tensor]
) -> Tensor:
    """A clipped step in float64 from the same gradients; returns the norm before clipping."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.double().cpu()
    norm = nn.utils.clip_grad_norm_(parameters, 1.0)
    exact.step()
    return norm


def assert_close(ours: Sequence[Tensor], exact: Sequence[Tensor], tolerance: float) -> None:
    for one, other in zip(ours, exact, strict=True):
        difference = (one.detach().double().cpu() - other.detach().double().cpu()).norm()
        assert difference <= tolerance * max(1.0, float(other.detach().norm()))


def bits(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of every parameter and every state."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = [t for p in parameters for t in optimizer.state[p].values()]
    return [tensor.detach().clone() for tensor in [*parameters, *states]]


def same_bits(ours: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(ours) == len(others) and all(torch.equal(*pair) for pair in zip(ours, others, strict=True))


def clipped_step(optimizer: FusedAdamW, step: int) -> Tensor:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter, gradient in zip(parameters, gradients_of(parameters, step), strict=True):
        parameter.grad = gradient
    norm = optimizer.clip_in_step(1.0)
    optimizer.step()
    optimizer.zero_grad()
    return norm


@pytest.mark.skipif(launch.INTERPRETED, reason="this is what the test starts")
def test_in_the_interpreter():
    pytest.importorskip("triton")
    assert "1 deselected" in run_in_interpreter(Path(__file__)), "the CUDA graph alone needs a card"


# ---------------------------------------------------------------------- with the kernels


@on_kernels
@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32,), (torch.bfloat16,), (torch.float32, torch.bfloat16)],
    ids=["float32", "bfloat16", "mixed"],
)
def test_clipped_steps_match_float64(dtypes, launches):
    parameters = parameters_of(dtypes)
    ours = FusedAdamW(groups_of(parameters), **OPTIONS)
    twins = doubled(parameters)
    exact = torch.optim.AdamW(groups_of(twins), **OPTIONS)
    for step in range(5):
        for optimizer in (ours, exact):
            optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
        gradients = gradients_of(parameters, step)
        norm = clipped_step(ours, step)
        assert float(norm) == pytest.approx(float(exact_step(exact, twins, gradients)), rel=1e-6)
    assert_close(parameters, twins, TOLERANCES[dtypes[-1]])
    for name in ("exp_avg", "exp_avg_sq", "step"):
        states = [[o.state[p][name] for p in ps] for o, ps in ((ours, parameters), (exact, twins))]
        assert_close(*states, TOLERANCES[dtypes[-1]])
    tables = len(dtypes)
    assert len(launches) == 5 * (1 + 3 * tables), "launches do not grow with the number of tensors"


@on_kernels
def test_as_good_as_torchs_fused_step():
    """Errors against float64 after ten steps are those of torch's own fused kernel, within a factor of two."""
    parameters = parameters_of((torch.float32,))
    theirs, exact = copy.deepcopy(parameters), doubled(parameters)
    optimizers = [
        FusedAdamW(groups_of(parameters), **OPTIONS),
        torch.optim.AdamW(groups_of(theirs), **OPTIONS, fused=True),
        torch.optim.AdamW(groups_of(exact), **OPTIONS),
    ]
    for step in range(10):
        gradients = gradients_of(parameters, step % 4)
        for optimizer, tensors in zip(optimizers, (parameters, theirs, exact), strict=True):
            for parameter, gradient in zip(tensors, gradients, strict=True):
                parameter.grad = gradient.to(parameter)
            optimizer.step()
    flat = [torch.cat([p.detach().double().cpu().flatten() for p in t]) for t in (parameters, theirs, exact)]
    errors = [float((one - flat[2]).norm()) for one in flat[:2]]
    assert errors[0] <= 2 * errors[1] + 1e-7


@on_kernels
@pytest.mark.parametrize("fault", ["found_inf", "nan", "inf"])
def test_a_skipped_step_changes_no_bit_and_does_not_count(fault):
    optimizer = FusedAdamW(groups_of(parameters_of((torch.float32, torch.bfloat16))), **OPTIONS)
    clipped_step(optimizer, 0)
    before = bits(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter, gradient in zip(parameters, gradients_of(parameters, 1), strict=True):
        parameter.grad = gradient
    if fault == "found_inf":
        optimizer.found_inf = torch.ones((), device=DEVICE)
    else:
        parameters[2].grad[512] = float(fault)
    norm = optimizer.clip_in_step(1.0)
    optimizer.step()
    assert bool(norm.isfinite()) == (fault == "found_inf")
    assert same_bits(bits(optimizer), before)
    if fault == "found_inf":
        optimizer.found_inf = torch.zeros((), device=DEVICE)
    clipped_step(optimizer, 2)
    assert {float(optimizer.state[p]["step"]) for p in parameters} == {2.0}
    assert not same_bits(bits(optimizer), before)


@on_kernels
def test_without_clipping_nothing_is_clipped_or_measured(launches):
    parameters = parameters_of((torch.float32,))
    twins = doubled(parameters)
    ours, exact = FusedAdamW(parameters, **OPTIONS), torch.optim.AdamW(twins, **OPTIONS)
    for parameter, twin, gradient in zip(parameters, twins, gradients_of(parameters, 3), strict=True):
        parameter.grad, twin.grad = gradient, gradient.double().cpu()
    ours.step()
    exact.step()
    assert launches == ["_advance_kernel", "_update_kernel"]
    assert_close(parameters, twins, TOLERANCES[torch.float32])
    exact_norm = torch.stack([twin.grad.square().sum() for twin in twins]).sum().sqrt()
    assert float(ours.clip_in_step(None)) == pytest.approx(float(exact_norm), rel=1e-6)
    ours.step()
    exact.step()
    assert_close(parameters, twins, TOLERANCES[torch.float32])


@on_kernels
def test_clearing_the_gradients_cancels_the_clipping():
    parameter = nn.Parameter(torch.zeros(4, device=DEVICE))
    optimizer = FusedAdamW([parameter], lr=1.0, betas=(0.0, 0.0), eps=1.0, weight_decay=0.0)
    parameter.grad = torch.full((4,), 100.0, device=DEVICE)
    optimizer.clip_in_step(1.0)
    optimizer.zero_grad()
    parameter.grad = torch.ones(4, device=DEVICE)
    optimizer.step()
    assert parameter.tolist() == [-0.5] * 4, "lr · g / (|g| + eps) of the new gradient, unclipped"


@on_kernels
def test_the_first_step_by_hand():
    """Norm 5 clipped to 1 gives 3/5 and 4/5; with β of 0 the step is lr · g / (|g| + eps)."""
    parameter = nn.Parameter(torch.tensor([1.0, -1.0], device=DEVICE))
    optimizer = FusedAdamW([parameter], lr=0.5, betas=(0.0, 0.0), eps=0.2, weight_decay=0.1)
    parameter.grad = torch.tensor([3.0, 4.0], device=DEVICE)
    assert float(optimizer.clip_in_step(1.0)) == 5.0
    optimizer.step()
    assert parameter.tolist() == pytest.approx([0.95 - 0.5 * 0.6 / 0.8, -0.95 - 0.5 * 0.8 / 1.0], abs=1e-6)
    assert parameter.grad.tolist() == [3.0, 4.0], "gradients are read and not written"


@on_kernels
def test_a_resumed_run_repeats_every_bit():
    whole = FusedAdamW(groups_of(parameters_of((torch.float32, torch.bfloat16))), **OPTIONS)
    for step in range(4):
        clipped_step(whole, step)
    first = FusedAdamW(groups_of(parameters_of((torch.float32, torch.bfloat16))), **OPTIONS)
    for step in range(2):
        clipped_step(first, step)
    saved = copy.deepcopy(first.state_dict())
    parameters = [p for group in first.param_groups for p in group["params"]]
    resumed = FusedAdamW(groups_of([nn.Parameter(p.detach().clone()) for p in parameters]), **OPTIONS)
    resumed.load_state_dict(saved)
    for step in range(2, 4):
        clipped_step(resumed, step)
    assert same_bits(bits(resumed), bits(whole))


@on_kernels
@pytest.mark.parametrize("fused", [True, False])
def test_state_dicts_are_torchs_both_ways(fused):
    """A run that changes from torch's AdamW to ours and back ends where float64 does."""
    parameters = parameters_of((torch.float32,))
    twins = doubled(parameters)
    theirs = torch.optim.AdamW(groups_of(parameters), **OPTIONS, fused=fused)
    ours = FusedAdamW(groups_of(parameters), **OPTIONS)
    exact = torch.optim.AdamW(groups_of(twins), **OPTIONS)
    for step in range(8):
        running, other = (theirs, ours) if step % 4 < 2 else (ours, theirs)
        gradients = gradients_of(parameters, step % 3)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        if running is ours:
            ours.clip_in_step(1.0)
        else:
            nn.utils.clip_grad_norm_(parameters, 1.0)
        running.step()
        exact_step(exact, twins, gradients)
        other.load_state_dict(copy.deepcopy(running.state_dict()))
    assert_close(parameters, twins, TOLERANCES[torch.float32])
    torchs = torch.optim.AdamW(groups_of(parameters), **OPTIONS, fused=True)
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    assert [list(group) for group in ours.state_dict()["param_groups"]] == [
        list(group) for group in torchs.state_dict()["param_groups"]
    ]
    assert list(ours.state[parameters[0]]) == ["step", "exp_avg", "exp_avg_sq"]


@on_kernels
def test_parameters_without_gradients_stand_still():
    parameters = parameters_of((torch.float32,))
    optimizer = FusedAdamW(groups_of(parameters), **OPTIONS)
    assert float(optimizer.clip_in_step(1.0)) == 0.0
    optimizer.step()
    assert not optimizer.state
    resting = parameters[2].detach().clone()
    for step, absent in enumerate((2, 2, None, 4)):
        for index, gradient in enumerate(gradients_of(parameters, step)):
            parameters[index].grad = None if index == absent else gradient
        optimizer.clip_in_step(1.0)
        optimizer.step()
        if step == 1:
            assert torch.equal(parameters[2], resting)
            assert parameters[2] not in optimizer.state
    assert [float(optimizer.state[p]["step"]) for p in parameters] == [4, 4, 2, 4, 3, 4]


@on_kernels
def test_gradients_that_move_or_have_strides_are_found(launches):
    """Gradients as views of a flat buffer, not aligned; then transposed; then elsewhere in memory."""
    parameters = [nn.Parameter(torch.ones(shape, device=DEVICE)) for shape in ((6, 5), (32, 16))]
    twins = doubled(parameters)
    ours, exact = FusedAdamW(parameters, **OPTIONS), torch.optim.AdamW(twins, **OPTIONS)
    flat = torch.randn(1 + 6 * 5 + 32 * 16, device=DEVICE)
    views = [flat[1:31].view(6, 5), flat[31:].view(32, 16)]
    turned = [torch.randn(view.shape[::-1], device=DEVICE).T for view in views]
    for gradients in (views, views, turned, [gradient.clone() for gradient in turned]):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        ours.clip_in_step(1.0)
        ours.step()
        exact_step(exact, twins, gradients)
    assert_close(parameters, twins, TOLERANCES[torch.float32])
    assert len(launches) == 16


@on_kernels
def test_autograd_sees_that_the_parameters_changed():
    parameter = nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer = FusedAdamW([parameter])
    loss = parameter.square().sum()
    parameter.grad = torch.ones(3, device=DEVICE)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@on_kernels
def test_a_kernel_that_is_switched_off_leaves_the_step_to_torch(monkeypatch, launches):
    """In the middle of a run, on the same state, with the same clipping, whoever wrote the state."""
    monkeypatch.setattr(launch, "switched_off", set())
    parameters = parameters_of((torch.float32,))
    twins = doubled(parameters)
    ours, exact = FusedAdamW(groups_of(parameters), **OPTIONS), torch.optim.AdamW(groups_of(twins), **OPTIONS)
    ours.load_state_dict(torch.optim.AdamW(groups_of(parameters), **OPTIONS, fused=False).state_dict())
    ours.found_inf = torch.zeros((), device=DEVICE)
    for step in range(4):
        if step == 2:
            launch.switched_off.add("adamw_")
            launches.clear()
        gradients = gradients_of(parameters, step)
        norm = clipped_step(ours, step)
        assert float(norm) == pytest.approx(float(exact_step(exact, twins, gradients)), rel=1e-6)
    assert launches == []
    assert_close(parameters, twins, TOLERANCES[torch.float32])


@pytest.mark.gpu
def test_no_host_synchronisation_and_a_graph_replays_the_step():
    parameters = parameters_of((torch.float32, torch.bfloat16))
    twins = copy.deepcopy(parameters)
    ours, eager = FusedAdamW(groups_of(parameters), **OPTIONS), FusedAdamW(groups_of(twins), **OPTIONS)
    for parameter, gradient in zip(parameters, gradients_of(parameters, 3), strict=True):
        parameter.grad = gradient
    for twin, parameter in zip(twins, parameters, strict=True):
        twin.grad = parameter.grad.clone()
    for optimizer in (ours, eager):
        optimizer.clip_in_step(1.0)
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.clip_in_step(1.0)
        ours.step()
    for step in range(3):
        for optimizer in (ours, eager):
            optimizer.param_groups[0]["lr"] = 1e-2 / (step + 2)
        torch.cuda.set_sync_debug_mode("error")
        try:
            ours.refresh()
            graph.replay()
            eager.clip_in_step(1.0)
            eager.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert same_bits(bits(ours), bits(eager))


# ---------------------------------------------------------------------- without them


@pytest.mark.skipif(launch.INTERPRETED, reason="in the interpreter the kernels compute on the CPU")
def test_on_a_cpu_torch_computes():
    model = nn.Linear(8, 4)
    assert not fits(model.parameters())
    optimizer = build_optimizer("adamw", model, learning_rate=1e-2, weight_decay=0.0, betas=(0.9, 0.99))
    assert type(optimizer) is torch.optim.AdamW
    ours = FusedAdamW(copy.deepcopy(model).parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0)
    twins = ours.param_groups[0]["params"]
    for step in range(2):
        for parameter, twin in zip(model.parameters(), twins, strict=True):
            parameter.grad = torch.full_like(parameter, step + 1.0)
            twin.grad = parameter.grad.clone()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert torch.equal(ours.clip_in_step(1.0), norm)
        optimizer.step()
        ours.step()
    assert same_bits(twins, list(model.parameters()))


@pytest.mark.parametrize("case", ["float16", "float64", "strided", "subclass", "none"])
def test_what_the_kernel_does_not_fit(case, monkeypatch):
    monkeypatch.setattr(fused_adamw.launch, "use_triton", lambda _tensor, _name: True)
    parameters = {
        "float16": [torch.zeros(4, dtype=torch.float16)],
        "float64": [torch.zeros(4), torch.zeros(4, dtype=torch.float64)],
        "strided": [torch.zeros(4, 3).T],
        "subclass": [nn.Buffer(torch.zeros(4)).as_subclass(type("Other", (Tensor,), {}))],
        "none": [],
    }
    assert fits([torch.zeros(4), nn.Parameter(torch.zeros(3, 4, dtype=torch.bfloat16))])
    assert not fits(parameters[case])


@pytest.mark.parametrize("option", [{"amsgrad": True}, {"maximize": True}, {"lr": torch.tensor(1e-3)}])
def test_options_that_the_kernel_lacks_are_left_to_torch(option, monkeypatch):
    monkeypatch.setattr(fused_adamw.launch, "use_triton", lambda _tensor, _name: True)
    parameter = nn.Parameter(torch.zeros(4))
    parameter.grad = torch.ones(4)
    optimizer = FusedAdamW([parameter])
    assert optimizer.refresh() is not None
    optimizer.param_groups[0].update(option)
    assert optimizer.refresh() is None
