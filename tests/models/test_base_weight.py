"""Weights as their layers use them."""

from __future__ import annotations

from pathlib import Path

import torch

from tunesmith.models.base_weight import base_weight
from tunesmith.models.loader import load_model

CPU = torch.device("cpu")


def test_weights_in_four_and_eight_bits_as_their_layers_use_them(wide_model_dir: Path) -> None:
    exact = (
        load_model(str(wide_model_dir), device=CPU, dtype=torch.float32).model.layers[0].mlp.up_proj.weight
    )
    eye = torch.eye(64)
    for quantize, bound in (
        ("nf4", 1e-6),
        ("int8", 2e-3),
    ):  # int8 layers round `eye` and their sums to float16
        model = load_model(str(wide_model_dir), device=CPU, dtype=torch.float32, quantize=quantize)
        layer = model.model.layers[0].mlp.up_proj
        for _ in range(2):  # the first call of an 8-bit layer moves its scales
            weight = base_weight(layer)
            torch.testing.assert_close(layer(eye).T, weight, rtol=0, atol=bound)
            assert 0 < (weight - exact).abs().max() < 0.02
