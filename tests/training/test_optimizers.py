"""Every optimizer of the table: it learns, goes on from a checkpoint bit for bit, takes the bytes planned."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from tests.support.tiny import tiny_llama
from tunesmith.contracts.errors import UserError
from tunesmith.distributed.backend import Gradients
from tunesmith.distributed.single import SingleDevice
from tunesmith.planning.fit import ROUNDING, STATE_BYTES
from tunesmith.training import low_bit, optim
from tunesmith.training.checkpoint import Checkpoint, CheckpointStore
from tunesmith.training.optim import OPTIMIZERS, PACKAGES, Schedule, build_optimizer
from tunesmith.training.state import join_state, restore_rng, rng_state, split_state

RATES = {"sgd": 0.3}
"""Where it is not 2e-3, a rate at which a tiny model learns in six steps."""


@pytest.fixture(autouse=True)
def _installed(request: pytest.FixtureRequest) -> None:
    """Skip rows whose package is an extra that is not there."""
    params = getattr(getattr(request.node, "callspec", None), "params", {})
    package = PACKAGES.get(params.get("name", ""))
    if package is not None:
        pytest.importorskip(package, reason=f"{package} is in the extra `optimizers`")


def made(
    name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[SingleDevice, Schedule]:
    """A model whose matrices are large enough for moments of few bits, with its optimizer and schedule."""
    model = tiny_llama(seed, dtype, hidden_size=64, intermediate_size=128).train().to(device)
    rate = RATES.get(name, 2e-3)
    optimizer = build_optimizer(name, model, learning_rate=rate, weight_decay=0.01, betas=(0.9, 0.99))
    shape = "constant" if name == "schedule_free_adamw" else "cosine"
    schedule = Schedule(shape, learning_rate=rate, warmup=2, total_steps=8)
    return SingleDevice(model, optimizer, torch.device(device), torch.float32), schedule


def learn(backend: SingleDevice, schedule: Schedule, steps: range) -> list[float]:
    """Steps on the same tokens; returns the losses."""
    ids = torch.randint(3, 380, (4, 24), generator=torch.Generator().manual_seed(5))
    ids = ids.to(backend.device)
    losses = []
    for step in steps:
        schedule.apply(backend.optimizer, step)
        loss = backend.module(input_ids=ids, labels=ids).loss
        loss.backward()
        update = backend.clip_and_step(Gradients((loss.detach(),), 1.0), 1.0)
        assert update.applied
        losses.append(update.losses[0])
    return losses


def saved(backend: SingleDevice, folder: Path) -> Checkpoint:
    """A checkpoint as the trainer writes it."""
    tensors, optimizer = split_state("optimizer", backend.state())
    rng_tensors, rng = rng_state()
    parameters = {f"model/{name}": p for name, p in backend.trained_parameters().items()}
    state = {"optimizer": optimizer, "rng": rng}
    return CheckpointStore(folder, keep=1).save(
        3, {**parameters, **tensors, **rng_tensors}, state, metric=None
    )


def restored(backend: SingleDevice, checkpoint: Checkpoint) -> None:
    tensors, state = checkpoint.tensors(), checkpoint.state()
    weights = {name.removeprefix("model/"): t for name, t in tensors.items() if name.startswith("model/")}
    backend.load_trained_parameters(weights)
    backend.load_state(join_state("optimizer", tensors, state["optimizer"]))
    restore_rng(tensors, state["rng"])


def ordered(skeleton: Any) -> Any:
    """The same with the items of dicts in one order: parameters may be stepped in any."""
    if isinstance(skeleton, list):
        return [ordered(item) for item in skeleton]
    if not isinstance(skeleton, dict):
        return skeleton
    pairs = {key: ordered(value) for key, value in skeleton.items()}
    return pairs | ({"!dict": sorted(pairs["!dict"], key=repr)} if "!dict" in pairs else {})


def assert_same(one: SingleDevice, other: SingleDevice) -> None:
    (tensors, skeleton), (others, other_skeleton) = (split_state("s", b.state()) for b in (one, other))
    assert ordered(skeleton) == ordered(other_skeleton)
    torch.testing.assert_close(others, tensors, rtol=0, atol=0, equal_nan=True)
    weights = [dict(b.trained_parameters()) for b in (one, other)]
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_learns_and_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    backend, schedule = made(name)
    losses = learn(backend, schedule, range(3))
    checkpoint = saved(backend, tmp_path)
    losses += learn(backend, schedule, range(3, 7))
    assert losses[-1] < losses[0] - 0.05
    resumed, schedule = made(name, seed=1)
    restored(resumed, checkpoint)
    assert learn(resumed, schedule, range(3, 7)) == losses[3:]
    assert_same(resumed, backend)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_on_a_gpu_it_learns_and_goes_on(name: str, tmp_path: Path) -> None:
    """Sums of the backward pass are in any order there, so that losses agree to a thousandth and not to the bit."""
    if name == "adamw_torch_fp8" and torch.cuda.get_device_capability() < low_bit.FLOAT8:
        pytest.skip("this GPU has no float8")
    backend, schedule = made(name, device="cuda")
    losses = learn(backend, schedule, range(3))
    checkpoint = saved(backend, tmp_path)
    losses += learn(backend, schedule, range(3, 7))
    assert losses[-1] < losses[0] - 0.05
    resumed, schedule = made(name, seed=1, device="cuda")
    restored(resumed, checkpoint)
    assert learn(resumed, schedule, range(3, 7)) == pytest.approx(losses[3:], rel=1e-3)


@pytest.mark.parametrize("name", ROUNDING)
def test_bfloat16_weights_go_on_bit_for_bit_and_are_not_rounded_to_nearest(name: str, tmp_path: Path) -> None:
    backend, schedule = made(name, dtype=torch.bfloat16)
    learn(backend, schedule, range(3))
    checkpoint = saved(backend, tmp_path)
    expected = learn(backend, schedule, range(3, 6))
    resumed, schedule = made(name, seed=1, dtype=torch.bfloat16)
    restored(resumed, checkpoint)
    assert learn(resumed, schedule, range(3, 6)) == expected
    assert_same(resumed, backend)
    moments = [t for name, t in split_state("s", backend.state())[0].items() if "exp_avg" in name]
    assert torch.bfloat16 not in {moment.dtype for moment in moments}


@pytest.mark.parametrize("name", ROUNDING)
def test_steps_below_half_a_unit_are_not_lost(name: str) -> None:
    """Each step is 1e-3, and next to 1.0 bfloat16 has 1 ± 2⁻⁸ … 2⁻⁷: to the nearest, no weight would ever move."""
    torch.manual_seed(0)
    model = nn.Linear(64, 128, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(model.weight)
    optimizer = build_optimizer(name, model, learning_rate=1e-3, weight_decay=0.0, betas=(0.9, 0.99))
    for _ in range(10):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
    # 10 steps of 1e-3 over 8192 weights: the mean is off by at most 5 standard errors of 2⁻⁸ each
    assert model.weight.detach().double().mean().item() == pytest.approx(1 - 10e-3, abs=1e-3)


def bytes_of(value: Any) -> int:
    if hasattr(value, "__tensor_flatten__") and type(value) is not Tensor:
        return sum(bytes_of(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return value.nbytes if isinstance(value, Tensor) else 0


def held(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, int]]:
    """Each parameter with the bytes of its state in memory."""
    for part in getattr(optimizer, "parts", {"": optimizer}).values():
        for parameter, state in part.state.items():
            yield parameter, sum(map(bytes_of, state.values()))


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_is_as_large_as_planned(name: str) -> None:
    model = nn.Sequential(nn.Embedding(512, 512), nn.Linear(512, 1024, bias=False))
    optimizer = build_optimizer(name, model, learning_rate=1e-3, weight_decay=0.0, betas=(0.9, 0.99))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    measured = {parameter: size / parameter.numel() for parameter, size in held(optimizer)}
    for parameter in model.parameters():
        # Muon is planned as if all of it were AdamW's; tables of codes and Adafactor's rows are a hundredth
        planned = 4.0 if name == "muon" and parameter is model[1].weight else STATE_BYTES[name]
        assert measured[parameter] == pytest.approx(planned, abs=0.02)


@pytest.mark.parametrize("name", [name for name, package in PACKAGES.items() if package == "torchao"])
def test_on_a_cpu_nothing_is_compiled(name: str) -> None:
    """Compiling takes a C++ compiler, and seconds for every shape."""
    counted = torch._dynamo.utils.counters["stats"]
    before = counted["unique_graphs"]
    backend, schedule = made(name)
    learn(backend, schedule, range(1))
    assert counted["unique_graphs"] == before


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_is_missing_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=f"{name} is of the package {PACKAGES[name]}") as caught:
        build_optimizer(name, nn.Linear(2, 2), learning_rate=1.0, weight_decay=0.0, betas=(0.9, 0.99))
    assert "tunesmith[optimizers]" in str(caught.value.hint)


def test_float8_needs_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")

    class OnGpu:
        device = torch.device("cuda")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(UserError, match="the NVIDIA A100 does not"):
        low_bit.build("AdamWFp8", [{"params": [OnGpu()]}], 1e-3, (0.9, 0.99))
