"""What layers hold between steps while the run draws samples."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from tests.models.test_decoder_truths import batch_of, computed
from tests.models.test_unpacked import FULL, held_bytes, qlora
from tunesmith.config.samples import _as_stock
from tunesmith.models.head import CausalModel
from tunesmith.models.install import install


@pytest.mark.parametrize("graphs", [False, True])
def test_unpacked_weights_make_room_for_samples_unless_graphs_know_where_they_lie(graphs):
    model = qlora()
    installed = install(model, policy=FULL)
    before, _ = computed(model, torch.float32, batch_of())
    causal = CausalModel(model, torch.float32)
    backend = SimpleNamespace(use_graphs=graphs, autocast=nullcontext)
    with _as_stock(causal, causal.base.config._attn_implementation, backend, installed):
        assert bool(held_bytes(installed)) == graphs
    after, _ = computed(model, torch.float32, batch_of())
    assert torch.equal(after, before)
