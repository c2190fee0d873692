"""What a run says to torch's allocator."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tunesmith.training.allocator import grow_segments

GROWS = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.parametrize(
    ("environment", "release", "after"),
    [
        ({}, "6.8.0-45-generic", GROWS),
        ({"PYTORCH_CUDA_ALLOC_CONF": ""}, "6.8.0", None),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}, "6.8.0", None),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, "6.8.0", None),
        ({}, "5.15.167.4-microsoft-standard-WSL2", None),
    ],
    ids=str,
)
def test_what_the_environment_says_is_left_alone(
    environment: dict[str, str], release: str, after: dict[str, str] | None
) -> None:
    after = dict(environment) if after is None else after
    assert grow_segments(environment, release) == after


@pytest.mark.gpu
def test_a_run_has_segments_that_grow() -> None:
    code = """if True:
        from tunesmith.training.allocator import grow_segments
        import torch
        grow_segments()
        one = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
        print([segment["is_expandable"] for segment in torch.cuda.memory_snapshot()])
    """
    assert torch.cuda.is_available()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[True]"
    assert "deprecated" not in done.stderr
