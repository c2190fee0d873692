"""`train.cuda_graphs`: where graphs are recorded, and what is said where they are not."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.tiny import tiny_llama
from tunesmith.config import assemble
from tunesmith.config.assemble import _record
from tunesmith.config.load import load_settings
from tunesmith.contracts.errors import UserError
from tunesmith.models.adapter import add_lora
from tunesmith.models.install import Installed, install
from tunesmith.planning.fit import Fit
from tunesmith.settings.run import RunSettings

SMALL, LARGE = (Fit(policy="keep", tokens=tokens, bytes_per_token=1.0) for tokens in (4096, 10**9))


def settings(**train: Any) -> RunSettings:
    return load_settings({"model": {"name": "x"}, "data": {"train": [{"path": "a"}]}, "train": train})


def backend(device: str = "cuda", scaled: bool = False) -> Any:
    scaler = SimpleNamespace(is_enabled=lambda: scaled)
    return SimpleNamespace(device=torch.device(device), scaler=scaler, use_graphs=False)


def fused(dropout: float = 0.0, policy: str = "keep") -> Installed:
    model = add_lora(tiny_llama(), rank=2, alpha=4, dropout=dropout, targets="all-linear", seed=0)
    return install(model, policy=policy)


@pytest.fixture(autouse=True)
def _free(monkeypatch):
    monkeypatch.setattr(assemble, "_free_bytes", lambda _device: 80 * 2**30)


def test_what_fits_once_only_is_not_recorded():
    tight = Fit(policy="keep", tokens=4096, bytes_per_token=60 * 2**30 / 4096)
    found = _record(settings(), backend(), fused(), tight)
    assert found is not None
    assert "fit twice" in found


def test_weights_that_will_be_held_unpacked_take_room_from_graphs():
    fits = Fit(policy="keep", tokens=4096, bytes_per_token=20 * 2**30 / 4096)
    assert _record(settings(), backend(), fused(), fits) is None
    held = replace(fits, unpacked=40 * 2**30)
    assert "fit twice" in (_record(settings(), backend(), fused(), held) or "")


def test_gradients_that_fit_once_only_are_not_recorded(monkeypatch):
    """A graph leaves all gradients of a micro-batch before it adds them up."""
    installed = install(tiny_llama())
    gradients = sum(parameter.nbytes for parameter in installed.model.parameters())
    one_token = Fit(policy="keep", tokens=1, bytes_per_token=1.0)
    monkeypatch.setattr(assemble, "_free_bytes", lambda _device: int(2 * gradients / assemble.USABLE) - 10)
    assert "gradients would have to fit twice" in (_record(settings(), backend(), installed, one_token) or "")
    monkeypatch.setattr(assemble, "_free_bytes", lambda _device: int(2 * gradients / assemble.USABLE) + 10)
    assert _record(settings(), backend(), installed, one_token) is None


def test_small_models_are_recorded_and_large_ones_are_not():
    small, large = backend(), backend()
    assert _record(settings(), small, fused(), SMALL) is None
    assert small.use_graphs
    assert _record(settings(), large, fused(), LARGE) == "the model keeps the GPU busy without"
    assert not large.use_graphs
    assert _record(settings(cuda_graphs="always"), large, fused(), LARGE) is None
    assert large.use_graphs
    assert _record(settings(cuda_graphs="never"), small, fused(), SMALL) == "train.cuda_graphs is never"


@pytest.mark.parametrize(
    ("train", "where", "layers", "reason"),
    [
        ({}, {"device": "cpu"}, {}, "no GPU"),
        ({}, {"scaled": True}, {}, "loss scale"),
        ({"deterministic": True}, {}, {}, "goes on"),
        ({"neftune_alpha": 5.0}, {}, {}, "noise"),
        ({}, {}, {"dropout": 0.1}, "dropout"),
        ({}, {}, {"policy": "offload"}, "to the host"),
    ],
    ids=["cpu", "float16", "deterministic", "neftune", "dropout", "offload"],
)
def test_what_cannot_be_recorded_is_said_and_refused_where_asked_for(train, where, layers, reason):
    here = backend(**where)
    found = _record(settings(**train), here, fused(**layers), SMALL)
    assert found is not None
    assert reason in found
    assert not here.use_graphs
    with pytest.raises(UserError, match=reason):
        _record(settings(cuda_graphs="always", **train), here, fused(**layers), SMALL)


def test_stock_layers_are_not_recorded():
    installed = install(tiny_llama(hidden_act="relu"))
    assert installed.recordable() == "not every decoder layer is fused"


def test_parameters_of_a_layer_are_its_linear_weights():
    model = add_lora(tiny_llama(), rank=2, alpha=4, dropout=0.0, targets="all-linear", seed=0)
    layer = model.get_base_model().model.layers[0]
    weights = [m.base_layer.weight.numel() for m in layer.modules() if hasattr(m, "base_layer")]
    assert len(weights) == 7
    assert install(model).layer_parameters() == sum(weights)
