"""The norm behind the last layer: what the stock module computes, in fewer bytes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.models.test_families import TINY
from tests.support.fake_gpu import fake_gpu, materialise
from tunesmith.models.install import install

FAMILIES = ("llama", "gemma2", "starcoder2", "cohere", "olmo2")
ROWS = torch.float64


def backbone_of(family: str, dtype: torch.dtype = ROWS) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **TINY)).to(dtype)
    norm = model.get_decoder().norm
    with torch.no_grad():  # as it starts, a weight of 1 or 0 and a bias of 0 would hide much
        for parameter in norm.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def passed(norm: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The output, the gradient of the rows, and those of what trains."""
    rows = hidden.clone().requires_grad_()
    norm.zero_grad()
    out = norm(rows)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape))
    assert rows.grad is not None
    return out.detach(), rows.grad, *(p.grad.clone() for p in norm.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trains", [True, False])
def test_it_is_the_stock_norm(family: str, trains: bool) -> None:
    model = backbone_of(family)
    norm = model.get_decoder().norm
    norm.requires_grad_(trains)
    hidden = torch.randn(1, 37, model.config.hidden_size, dtype=ROWS) * 3
    expected = passed(copy.deepcopy(norm), hidden)
    installed = install(model)
    seen = passed(norm, hidden)
    assert "forward" in vars(norm)
    assert len(seen) == len(expected) == 2 + (len(list(norm.parameters())) if trains else 0)
    for one, other in zip(seen, expected, strict=True):
        # stock norms of transformers compute in float32 whatever they are given
        tolerance = 1e-12 if family == "starcoder2" else 1e-6
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    installed.undo()
    assert "forward" not in vars(norm)


def test_without_gradients_it_is_the_stock_norm_bit_for_bit() -> None:
    model = backbone_of("llama", torch.bfloat16)
    norm = model.get_decoder().norm
    hidden = torch.randn(2, 5, model.config.hidden_size, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = norm(hidden)
        install(model)
        assert torch.equal(norm(hidden), expected)


def test_the_type_stays_under_autocast() -> None:
    model = backbone_of("llama", torch.bfloat16)
    install(model)
    hidden = torch.randn(1, 5, model.config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.get_decoder().norm(hidden).dtype == torch.bfloat16


def test_a_model_with_stock_layers_keeps_its_norm() -> None:
    model = backbone_of("llama")
    layer = model.get_decoder().layers[0]
    layer.__class__ = type("Mine", (type(layer),), {"__module__": "elsewhere"})
    assert install(model).stock
    assert "forward" not in vars(model.get_decoder().norm)


def test_what_it_holds() -> None:
    """The rows and one number of each, where the stock norm holds them in float32 as well."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY)).to(torch.bfloat16)
    model.requires_grad_(False)
    with fake_gpu() as live:
        materialise(model)
        install(model)
        tokens, width = 4096, model.config.hidden_size
        hidden = torch.empty(1, tokens, width, dtype=torch.bfloat16, requires_grad=True)
        before = live.peak = live.now
        out = model.get_decoder().norm(hidden)
        assert live.now - before == 2 * tokens * width + 4 * tokens
        live.peak = live.now
        at = live.now
        out.backward(torch.empty_like(out))
        assert live.peak - at == 2 * 2 * tokens * width
