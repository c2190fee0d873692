"""A base in 4 bits is quantised as it is read: one weight in full precision at a time, and progress is told."""

from __future__ import annotations

import json
from collections.abc import Callable, Container
from itertools import accumulate
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile

from tests.support.tiny import tiny_llama
from tunesmith.models.loader import load_model
from tunesmith.models.loading_progress import loading_progress

CPU = torch.device("cpu")
LAYERS = 5
WIDTH = 256
SIZES = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "tie_word_embeddings": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in bfloat16 in several files."""
    path = tmp_path_factory.mktemp("sharded") / "model"
    model = tiny_llama(
        dtype=torch.bfloat16,
        num_hidden_layers=LAYERS,
        **SIZES,
    )
    model.save_pretrained(path, max_shard_size="1300KB")
    assert len(list(path.glob("*.safetensors"))) > 5
    return path


def tiny_parameters() -> list[torch.Tensor]:
    """The parameters of that model, before they are rounded."""
    return list(tiny_llama(num_hidden_layers=1, **SIZES).parameters())


def bytes_alive(work: Callable[[], Any], trace: Path, mapped: Container[int] = ()) -> tuple[int, int]:
    """Bytes of torch's CPU allocator at the peak and at the end of some work whose result is held.

    Args:
        mapped: sizes that are not counted, of files mapped into memory, whose pages the system takes back at will.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        held = work()
    recorded.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "[memory]"]
    sizes = [e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"])]
    alive = list(accumulate(size for size in sizes if abs(size) not in mapped))
    assert held is not None
    return max(alive), alive[-1]


def test_one_weight_in_full_precision_at_a_time(folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    mapped = {file.stat().st_size for file in folder.glob("*.safetensors")}
    assert not mapped & {4 * parameter.numel() for parameter in tiny_parameters()}
    # float32, so that every weight of the files in bfloat16 has to be brought into memory
    peak, stays = bytes_alive(
        lambda: load_model(str(folder), device=CPU, dtype=torch.float32, quantize="nf4"), trace, mapped
    )
    largest = torch.randn(3 * WIDTH, WIDTH, dtype=torch.bfloat16)
    one, kept = bytes_alive(
        lambda: bitsandbytes.functional.quantize_4bit(largest.float(), blocksize=64, quant_type="nf4"), trace
    )
    weights, layer = 12 * WIDTH**2 * LAYERS, 4 * 12 * WIDTH**2
    assert stays < 1.2 * (weights / 2 + 2 * 4 * 384 * WIDTH)  # half a byte a weight, embeddings and head
    # the largest weight, and what bitsandbytes takes to round it on a CPU, beside what stays
    assert 4 * largest.numel() <= peak - stays < (one - kept) + 0.1 * layer
    assert one - kept + 0.1 * layer < 4 * weights / 2, "all weights in float32 would go over it by far"


def test_weights_of_several_files_are_those_that_bitsandbytes_makes_of_each(folder: Path) -> None:
    model = load_model(str(folder), device=CPU, dtype=torch.bfloat16, quantize="nf4")
    files = {
        name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    assert {f"{name}.weight" for name, m in model.named_modules() if hasattr(m, "weight")} == set(files)
    for name, module in model.named_modules():
        if not hasattr(module, "weight"):
            continue
        weight = files[f"{name}.weight"]
        if not isinstance(module, bitsandbytes.nn.Linear4bit):
            assert torch.equal(module.weight, weight)
            continue
        packed, state = bitsandbytes.functional.quantize_4bit(
            weight, blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        assert torch.equal(module.weight.data, packed)
        ours, theirs = module.weight.quant_state.as_dict(packed=True), state.as_dict(packed=True)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_progress_is_told(folder: Path) -> None:
    lines: list[tuple[str, bool]] = []
    load_model(str(folder), device=CPU, dtype=torch.float32, tell=lambda *line: lines.append(line))
    total = 9 * LAYERS + 3
    assert lines == [(f"loading weights: {number} of {total}", False) for number in range(1, total + 1)]


def test_progress_leaves_no_trace() -> None:
    from transformers.utils import logging

    def mine(factory, args, options):
        return factory(*args, **options)

    before = logging.set_tqdm_hook(mine)
    try:
        with loading_progress(lambda *_: None):
            assert list(logging.tqdm([1, 2], desc="Something else", disable=True)) == [1, 2]
        with loading_progress(None):
            assert logging.set_tqdm_hook(mine) is mine
    finally:
        assert logging.set_tqdm_hook(before) is mine
