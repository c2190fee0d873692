"""Rows of a table on the host: what is refused, and on a card what only a card can show."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.kernels.compare import count_launches
from tunesmith.kernels.gather_rows import gather_rows, gather_rows_op


def _table(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(rows, columns).to(dtype)


def test_a_table_that_trains_is_refused_and_not_left_without_its_gradient():
    with pytest.raises(AssertionError, match="no gradient here"):
        gather_rows(torch.randn(11, 5, requires_grad=True), torch.tensor([1]))


@pytest.mark.parametrize("wrong", [-1, 11])
def test_an_id_that_is_no_row_is_an_error(wrong):
    with pytest.raises(IndexError):
        gather_rows(torch.randn(11, 5), torch.tensor([0, wrong]))


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["pinned", "cuda", "pageable"])
def test_rows_arrive_on_the_device_of_the_ids(where, monkeypatch):
    """A table in pageable memory, which a kernel cannot read, is read all the same."""
    launches, table = count_launches(monkeypatch), _table(97, 100)
    held = {"pinned": torch.Tensor.pin_memory, "cuda": torch.Tensor.cuda, "pageable": torch.clone}[where](
        table
    )
    ids = torch.tensor([96, 0, 5, 5])
    for function in (gather_rows, gather_rows_op):
        found = function(held, ids.cuda())
        assert found.is_cuda
        assert torch.equal(found.cpu(), table[ids])
    assert launches == ([] if where == "pageable" else ["_gather_kernel"] * 2)


@pytest.mark.gpu
def test_a_graph_reads_the_rows_of_its_ids_anew():
    table = _table(4096, 8192).pin_memory()
    ids = torch.arange(33, device="cuda")
    gather_rows(table, ids)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gather_rows(table, ids)
    for _ in range(3):
        ids.copy_(torch.randint(0, 4096, (33,)))
        graph.replay()
        assert torch.equal(found.cpu(), table[ids.cpu()])


@pytest.mark.gpu
def test_the_last_row_of_a_table_of_more_than_2_31_elements():
    table = torch.empty(2**18 + 2, 8192, dtype=torch.float16, pin_memory=True)
    table[-2:] = _table(2, 8192, torch.float16)
    found = gather_rows(table, torch.tensor([len(table) - 1, len(table) - 2], device="cuda"))
    assert torch.equal(found.cpu(), table[-2:].flip(0))


@pytest.mark.gpu
@pytest.mark.parametrize("wrong", [-1, 11, 2**32])
def test_a_wrong_id_stops_the_device_before_it_reads(wrong):
    """In a process of its own, whose device is of no use afterwards."""
    program = f"""
import torch
from tunesmith.kernels.gather_rows import gather_rows
gather_rows(torch.randn(11, 64).pin_memory(), torch.tensor([0, {wrong}], device="cuda"))
torch.cuda.synchronize()
print("went on")
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "went on" not in run.stdout
    assert "an id is not a row of the table" in run.stderr
    assert "device-side assert" in run.stderr
