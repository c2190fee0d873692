"""A QLoRA run whose plan has room for unpacked weights: it holds them, and lets go of them where memory runs out."""

from __future__ import annotations

import torch

from tests.config.test_fit_run import GIB, planned
from tests.models.test_decoder_truths import batch_of, computed
from tests.models.test_unpacked import held_bytes, qlora
from tunesmith.models.head import CausalModel
from tunesmith.models.install import install
from tunesmith.planning.policies import UNPACKED


def test_a_run_holds_what_its_plan_says_and_less_after_it_ran_out_of_memory():
    model = qlora(layers=4)
    causal, installed = CausalModel(model, torch.float32), install(model)
    found = planned(causal, installed, usable=80 * GIB)
    assert set(found.solution.policies) <= set(UNPACKED)
    hidden, grads = computed(model, torch.float32, batch_of())
    foreseen = [way.unpacked for way in found.solution.frame.of(found.solution.policies)]
    # of four buffers a layer each is rounded up to 512 bytes
    more = [size - held for size, held in zip(foreseen, held_bytes(installed), strict=True)]
    assert all(0 <= size < 4 * 512 for size in more)
    assert found.fit().unpacked == sum(foreseen) > 0
    while set(found.solution.policies) & set(UNPACKED):
        before = len(held_bytes(installed))
        assert found.down(4096, 4096) is not None
        assert len(held_bytes(installed)) <= before
    assert found.fit().unpacked == 0
    assert held_bytes(installed) == []
    other, other_grads = computed(model, torch.float32, batch_of())
    assert torch.equal(other, hidden)
    assert all(torch.equal(grads[name], other_grads[name]) for name in grads)
