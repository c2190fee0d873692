"""Runs `interpreted.py` in a process that imports the kernels with Triton's interpreter switched on."""

from __future__ import annotations

import pytest

from tests.support.interpreter import run_in_interpreter

pytest.importorskip("triton")


def test_kernels_in_the_interpreter():
    run_in_interpreter("tests/kernels/interpreted.py")


def test_tensors_of_more_elements_than_32_bits_count():
    run_in_interpreter("tests/kernels/interpreted_large.py")
