"""Runs `interpreted_families.py` in a process that imports the kernels with Triton's interpreter switched on."""

from __future__ import annotations

import pytest

from tests.support.interpreter import run_in_interpreter

pytest.importorskip("triton")


def test_families_in_the_interpreter():
    run_in_interpreter("tests/models/interpreted_families.py")


@pytest.mark.slow
def test_families_with_more_ranks_in_the_interpreter():
    run_in_interpreter("tests/models/interpreted_families.py", "-m", "slow")
