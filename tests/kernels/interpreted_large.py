"""Kernels on tensors of more than 2^31 elements, of which the last rows only are computed and looked at.

The memory behind the other rows is never touched, so the system never provides it. Programs of the last rows run with
the numbers that they have in the whole grid: an offset formed in 32 bits wraps around, and the process dies or the
rows stay what they were. Not collected by itself, see `interpreted.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import interpreter_builder

from tests.kernels.compare import copied, error, results
from tests.kernels.large import HALF, LIMIT, at_the_end, cases, long, room
from tunesmith.kernels import (
    adamw,
    adamw_8bit,
    attention_triton,
    cross_entropy,
    gather_rows,
    glu,
    launch,
    layer_norm,
    nf4,
    qk_norm,
    residual,
    rms_norm,
    rope,
)
from tunesmith.kernels.catalog import CATALOG
from tunesmith.kernels.packed import Documents, Heads, Scores
from tunesmith.kernels.rope import RotaryLayout

MODULES = (
    adamw, adamw_8bit, attention_triton, cross_entropy, gather_rows, glu, layer_norm, nf4, qk_norm, residual,
    rms_norm, rope,
)  # fmt: skip
CASES = cases(4096, 524_352)


@contextmanager
def last_programs(count: int) -> Iterator[list[str]]:
    """Launches run the last programs of their first axis only, under their own numbers."""
    seen: list[str] = []

    def launched(kernel: Any, grid: tuple[int, ...], first: Tensor, *args: Any, **options: Any) -> None:
        seen.append(kernel.fn.__name__)
        few = min(count, grid[0])
        whole = (*grid, 1, 1)[:3]

        def set_dim(*_: int) -> None:
            interpreter_builder.grid_dim = whole

        def set_index(x: int, y: int, z: int) -> None:
            interpreter_builder.grid_idx = (x + grid[0] - few, y, z)

        with (
            mock.patch.object(interpreter_builder, "set_grid_dim", set_dim),
            mock.patch.object(interpreter_builder, "set_grid_idx", set_index),
        ):
            launch.launch(kernel, (few, *grid[1:]), first, *args, **options)

    patches = [mock.patch.object(module, "launch", launched) for module in MODULES]
    for patch in patches:
        patch.start()
    try:
        yield seen
    finally:
        for patch in patches:
            patch.stop()


@pytest.mark.parametrize(
    ("name", "case"), [(name, n) for name, cases in CASES.items() for n in range(len(cases))]
)
def test_last_rows_of_many(name, case):
    size, programs, tokens = CASES[name][case]
    torch.manual_seed(0)
    row = CATALOG[name]
    inputs = row.cases(size, HALF, torch.device("cpu"))
    inputs = {key: value.to(HALF) if key == "y_TN" else value for key, value in inputs.items()}
    count = size.get("tokens", size.get("rows"))
    exact = results(row.reference, row, copied(inputs, torch.float64))
    large = long(inputs, tokens)
    assert max(value.numel() for value in large.values() if isinstance(value, Tensor)) > LIMIT
    with last_programs(programs) as seen:
        ours = results(row.op, row, large)
    assert seen
    assert len(ours) == len(exact)
    for found, right in zip(ours, exact, strict=True):
        last = found[:, -count:] if found.shape[0] == 2 else found[-count:]  # statistics are [2, T]
        assert error(last, right) < row.tolerances[HALF]


def test_sums_of_many_blocks_of_tokens():
    """A norm's weight gradient of q and k leaves a row of every block; here of more than 2^31 elements in all."""
    heads, kv_heads, size = 60, 4, 128
    layout = RotaryLayout(heads, kv_heads, size)
    rows = qk_norm._rows(layout)[0]
    tokens = rows * (LIMIT // (64 * 128) + 1)
    qkv_1N, grad_1N = torch.randn(1, sum(layout.sizes)).to(HALF), torch.randn(1, sum(layout.sizes)).to(HALF)
    angle_1K = torch.rand(1, size)
    tables = angle_1K.cos(), angle_1K.sin()
    norms = qk_norm.Norms(torch.rand(size) + 0.5, torch.rand(size) + 0.5, 1e-6)
    exact = qk_norm.qk_norm_rope_backward_reference_(
        grad_1N.double().expand(rows, -1).clone(), qkv_1N.double().expand(rows, -1),
        *(table.double().expand(rows, -1) for table in tables), layout,
        qk_norm.Norms(norms.q_weight_K.double(), norms.k_weight_K.double(), 1e-6), weight_grad=True,
    )  # fmt: skip
    assert exact is not None
    sums = []

    def last_sums(partial_PHK: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        assert partial_PHK.numel() > LIMIT
        sums.append(partial_PHK[-1])
        return partial_PHK[-1], partial_PHK[-1]

    room(LIMIT + 1, dtype=torch.float32)
    grad_TN = grad_1N.expand(tokens, -1)
    with last_programs(1), mock.patch.object(qk_norm, "_weight_gradients", last_sums):
        # all tokens share one row of memory, whose gradient a program writes after it has read it
        qk_norm.qk_norm_rope_backward_(
            grad_TN, qkv_1N.expand(tokens, -1), *(table.expand(tokens, -1) for table in tables), layout, norms,
            weight_grad=True,
        )  # fmt: skip
    q_K, k_K = sums[0].split([heads, kv_heads])
    assert error(q_K.sum(0), exact[0]) < 2e-3
    assert error(k_K.sum(0), exact[1]) < 2e-3


@pytest.mark.parametrize("columns", [4096, 4091], ids=["words", "elements"])
@pytest.mark.parametrize("pad", [0, 64])
@pytest.mark.parametrize("nested", [False, True])
def test_last_weights_of_many(nested, pad, columns):
    rows = LIMIT // columns + 64
    count = rows * columns
    blocks = -(-count // 64)
    packed, out = room(-(-count // 2), dtype=torch.uint8), room(rows, columns + pad)[:, :columns]
    few = (count - 3 * columns) // 8192 * 8192  # elements that are not looked at
    packed[few // 2 :] = torch.randint(0, 256, (len(packed) - few // 2,), dtype=torch.uint8)
    absmax, scales = room(blocks, dtype=torch.float32), None
    if nested:
        codes, second = room(blocks, dtype=torch.uint8), room(-(-blocks // 256), dtype=torch.float32)
        codes[few // 64 :] = torch.randint(0, 256, (blocks - few // 64,), dtype=torch.uint8)
        second.fill_(0.7)
        scales = (codes, second, torch.linspace(-1, 1, 256), torch.full((), 2.0), 256)
        absmax_few = scales[2][codes[few // 64 :].long()] * 0.7 + 2.0
    else:
        absmax[few // 64 :] = torch.rand(blocks - few // 64)
        absmax_few = absmax[few // 64 :]
    code = torch.tensor(nf4.NF4_CODE)
    with last_programs(16):
        nf4.dequantize_nf4(packed, None if nested else absmax, out, code=code, blocksize=64, nested=scales)
    halves = packed[few // 2 :]
    index = torch.stack([halves >> 4, halves & 15], -1).flatten()[: count - few].long()
    exact = (code[index] * absmax_few.repeat_interleave(64)[: count - few]).to(HALF)
    assert torch.equal(out[-2:].flatten(), exact[-2 * columns :])


@pytest.mark.parametrize("columns", [4096, 4091])
def test_last_rows_of_a_large_table(columns):
    rows = LIMIT // columns + 2
    few = torch.randn(2, columns).to(HALF)
    table, ids = at_the_end(few, rows), torch.tensor([rows - 1, rows - 2, rows - 1])
    ours = gather_rows.gather_rows(table, ids)
    assert torch.equal(ours, few[[1, 0, 1]])


def test_last_of_many_rows_that_are_read():
    rows, columns = LIMIT // 4096 + 2, 4096
    table = torch.randn(2, columns).to(HALF)
    ids = at_the_end(torch.tensor([0, 1, 1, 0]), rows)
    with last_programs(4) as seen:
        ours = gather_rows.gather_rows(table, ids)
    assert seen == ["_gather_kernel"]
    assert ours.numel() > LIMIT
    assert torch.equal(ours[-4:], table[[0, 1, 1, 0]])


def test_last_document_of_a_long_row():
    room_behind = 64
    heads, last = Heads(2, 1, 128), 70
    tokens = LIMIT // heads.columns + 900
    documents = Documents((tokens - last, last), torch.tensor([0, tokens - last, tokens], dtype=torch.int32))
    torch.manual_seed(0)
    few = torch.randn(last, heads.columns).to(HALF)
    grad = torch.randn(last, heads.query * heads.size).to(HALF)
    fused = at_the_end(few, tokens)
    assert fused.numel() > LIMIT
    alone = Documents((last,), torch.tensor([0, last], dtype=torch.int32))
    out, lse = attention_triton.packed_attention_reference(few.double(), heads, alone, Scores())
    exact = attention_triton.packed_attention_backward_reference(
        grad.double(), few.double(), out, lse, heads, alone, Scores()
    )
    grad_TN = at_the_end(grad, tokens)
    with last_programs(6) as seen:  # the blocks with the least work come last
        ours, lse_HT = attention_triton.packed_attention(fused, heads, documents, Scores(), room_behind)
        assert error(ours[-last:], out) < 2e-3
        assert error(lse_HT[:, -last:], lse) < 1e-3
        back = attention_triton.packed_attention_backward(
            grad_TN, fused, ours, lse_HT, heads, documents, Scores(), room_behind
        )
    assert len(seen) == 3
    assert error(back[-last:], exact) < 3e-3


@pytest.mark.parametrize("bits", [32, 8])
def test_last_elements_of_a_large_parameter(bits):
    count, block = LIMIT + 3 * adamw.BLOCK, adamw.BLOCK
    torch.manual_seed(0)
    option = (1e-2, 0.9, 0.999, 1e-8, 0.1)
    parameter, gradient = room(count), room(count)
    parameter[-block:], gradient[-block:] = torch.randn(block), torch.randn(block)
    step = torch.tensor(3.0)
    if bits == 8:
        first, second = room(count, dtype=torch.uint8), room(count, dtype=torch.uint8)
        first[-block:], second[-block:] = 200, 100
        scales = [room(count // 256, dtype=torch.float32) for _ in range(2)]
        for scale in scales:
            scale[-block // 256 :] = 0.5
        m = adamw_8bit.decode(first[-block:], scales[0][-block // 256 :], signed=True, dtype=torch.float64)
        v = (
            adamw_8bit.decode(second[-block:], scales[1][-block // 256 :], signed=False, dtype=torch.float64)
            ** 2
        )
        tables = adamw_8bit.make_tables_8bit(
            [parameter], [first], [second], [scales[0]], [scales[1]], [step], [0]
        )
    else:
        first, second = room(count), room(count)
        first[-block:], second[-block:] = torch.randn(block) * 0.1, torch.rand(block)
        m, v = first[-block:].double(), second[-block:].double()
        tables = adamw.make_tables([parameter], [first], [second], [step], [0])
    exact = parameter[-block:].double()
    adamw.step_reference_(
        [exact], [gradient[-block:]], [m], [v], [torch.tensor(3.0)], groups=[0], options=[option],
        factor=torch.ones((), dtype=torch.float64), apply=torch.tensor(True), seed=None, numbers=None,
    )  # fmt: skip
    adamw.point_at(tables, [gradient])
    options = adamw.option_table([option], torch.device("cpu"))
    with last_programs(1):
        clip_2, found = torch.ones(2), torch.zeros(1)
        if bits == 8:
            adamw_8bit.update_8bit_(tables, options, clip_2, found, 0)
        else:
            adamw.update_(tables, options, clip_2, found)
    assert error(parameter[-block:], exact) < 1e-3
    assert float((parameter[-block:].double() - exact).norm()) < 0.05 * option[0] * block**0.5


def test_a_launch_of_the_last_programs_is_one_of_the_whole_grid():
    """What this file rests on: programs see the number and the extent that they have in the whole grid."""
    hidden = torch.randn(64, 300)
    whole = rms_norm.rms_norm(hidden, torch.ones(300), 1e-6)[0]
    with last_programs(5) as seen:
        few = rms_norm.rms_norm(hidden, torch.ones(300), 1e-6)[0]
    rows, _, _ = rms_norm.tile(300)
    assert seen == ["_forward_kernel"]
    computed = slice((-(-64 // rows) - 5) * rows, 64)
    assert torch.equal(few[computed], whole[computed])
    assert launch.INTERPRETED
