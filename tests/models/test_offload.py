"""The offloader: what is pulled is what was pushed, whatever the allocator does with the memory in between."""

from __future__ import annotations

import gc
from itertools import pairwise

import pytest
import torch

from tunesmith.models.offload import Handle, Offloader
from tunesmith.planning.policies import IN_FLIGHT

LAYERS = 12
# odd sizes, several types, two tensors of one size, nothing at all
SHAPES = (
    ((1021, 257), torch.bfloat16),
    ((1021, 257), torch.float16),
    ((333, 1025), torch.float32),
    ((7,), torch.int32),
    ((0, 5), torch.float32),
)


def test_on_the_cpu_tensors_stay_where_they_are_in_any_order_and_again():
    offloader = Offloader(enabled=False)
    for _ in range(2):
        pushed = [[torch.full((2, 3), float(n)), torch.full((n + 1,), n)] for n in range(4)]
        handles = [offloader.push(tensors) for tensors in pushed]
        for number in (3, 2, 1, 0, 2):
            pulled = offloader.pull(handles[number])
            assert [id(tensor) for tensor in pulled] == [id(tensor) for tensor in pushed[number]]
    assert offloader.host_bytes == 0


def test_on_the_cpu_a_push_is_of_the_tensors_in_the_list_then():
    offloader = Offloader(enabled=False)
    tensors = [torch.ones(2)]
    handle = offloader.push(tensors)
    tensors.clear()
    (pulled,) = offloader.pull(handle)
    assert torch.equal(pulled, torch.ones(2))


# ---------------------------------------------------------------------- on a GPU


def layer_tensors(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    return [
        torch.randint(-1000, 1000, shape, generator=generator, device="cuda").to(dtype)
        for shape, dtype in SHAPES
    ]


def junk(value: float) -> None:
    """Write over whatever the allocator hands out in the sizes of a layer, several layers of it."""
    held = [torch.full(shape, value, dtype=dtype, device="cuda") for _ in range(4) for shape, dtype in SHAPES]
    del held


def compute() -> None:
    """Keep the compute stream busy for milliseconds, so that copies really are under way beside it."""
    a = torch.ones(2048, 2048, device="cuda")
    for _ in range(8):
        a = (a @ a).clamp_(max=1.0)


def layers_through(offloader: Offloader, seed: int) -> list[bool]:
    """Push all layers, pull them in reverse, junk in all gaps; whether each tensor came back bit for bit."""
    handles = []
    for number in range(LAYERS):
        compute()
        handles.append(offloader.push(layer_tensors(seed + number)))
        junk(-7.0)
    equal = []
    for number in reversed(range(LAYERS)):
        pulled = offloader.pull(handles[number])
        junk(-9.0)
        compute()
        expected = layer_tensors(seed + number)
        equal += [torch.equal(p, e) and p.dtype == e.dtype for p, e in zip(pulled, expected, strict=True)]
        del pulled, expected
        junk(-8.0)
    return equal


@pytest.mark.gpu
def test_tensors_come_back_bit_for_bit_twice_and_host_memory_is_reused():
    offloader = Offloader(enabled=True)
    assert all(layers_through(offloader, seed=0))
    held = offloader.host_bytes
    assert held > 0
    assert all(layers_through(offloader, seed=100))
    assert offloader.host_bytes == held


@pytest.mark.gpu
def test_without_synchronisation_in_between():
    """`torch.equal` waits for the device; here nothing does until the end."""
    offloader = Offloader(enabled=True)
    for seed in (0, 100):
        handles = []
        for number in range(LAYERS):
            compute()
            handles.append(offloader.push(layer_tensors(seed + number)))
            junk(-7.0)
        wrong = torch.zeros((), device="cuda", dtype=torch.int64)
        for number in reversed(range(LAYERS)):
            for pulled, expected in zip(
                offloader.pull(handles[number]), layer_tensors(seed + number), strict=True
            ):
                wrong += (pulled != expected).sum()
                junk(-8.0)
        assert wrong.item() == 0


@pytest.mark.gpu
def test_device_memory_is_given_back_between_push_and_pull():
    offloader = Offloader(enabled=True)
    size = 1 << 24
    before = torch.cuda.memory_allocated()
    handles = [
        offloader.push([torch.full((size,), n % 100, dtype=torch.uint8, device="cuda")]) for n in range(8)
    ]
    assert torch.cuda.memory_allocated() - before <= 2 * size, "the last two may still be leaving"
    for number in reversed(range(8)):
        (pulled,) = offloader.pull(handles[number])
        assert torch.equal(pulled, torch.full_like(pulled, number))
        assert torch.cuda.memory_allocated() - before <= 3 * size, "this layer, the next and what is compared"
        del pulled
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
def test_memory_is_not_written_over_before_its_tensor_has_left():
    """64 MiB take over a millisecond to leave and microseconds to fill, with nothing to compute in between."""
    offloader = Offloader(enabled=True)
    size = 1 << 26
    for _ in range(2):  # the first round waits for pinned memory all the time, the second has it
        handles = []
        for number in range(6):
            handles.append(offloader.push([torch.full((size,), number, dtype=torch.uint8, device="cuda")]))
            torch.full((size,), 88, dtype=torch.uint8, device="cuda")
        for number in reversed(range(6)):
            (pulled,) = offloader.pull(handles[number])
            assert (pulled == number).all()
            del pulled


@pytest.mark.gpu
def test_a_handle_that_never_left_the_device_is_the_same_memory():
    offloader = Offloader(enabled=True)
    tensors = layer_tensors(3)
    addresses = [tensor.data_ptr() for tensor in tensors]
    handle = offloader.push(tensors)
    del tensors
    junk(-7.0)
    pulled = offloader.pull(handle)
    assert [tensor.data_ptr() for tensor in pulled] == addresses
    assert all(torch.equal(p, e) for p, e in zip(pulled, layer_tensors(3), strict=True))


@pytest.mark.gpu
def test_what_is_strided_comes_back_contiguous_and_equal():
    offloader = Offloader(enabled=True)
    whole = torch.arange(60, device="cuda").view(6, 10)
    handles = [offloader.push([whole.T]) for _ in range(4)]
    for handle in reversed(handles):
        (pulled,) = offloader.pull(handle)
        assert pulled.is_contiguous()
        assert torch.equal(pulled, whole.T)


@pytest.mark.gpu
def test_a_host_buffer_taken_again_at_once_waits_for_the_copy_back():
    """Pull and push alternate: the pushed layer takes the buffer whose copy back may still be under way."""
    offloader = Offloader(enabled=True)
    handles = [offloader.push(layer_tensors(n)) for n in range(4)]
    held = offloader.host_bytes
    for step in range(20):
        pulled = offloader.pull(handles[-1 - step % 4])
        handles[-1 - step % 4] = offloader.push(layer_tensors(100 + step))
        junk(-7.0)
        expected = layer_tensors((3 - step) if step < 4 else 96 + step)
        assert all(torch.equal(p, e) for p, e in zip(pulled, expected, strict=True)), step
    assert offloader.host_bytes == held


@pytest.mark.gpu
def test_forwards_that_nobody_goes_back_through_leave_nothing_behind():
    """An evaluation with gradients on, or a step given up: graph and handles die without a pull."""
    offloader = Offloader(enabled=True)
    grown = []
    for seed in range(0, 60, LAYERS):
        handles: list[Handle] = [offloader.push(layer_tensors(seed + number)) for number in range(LAYERS)]
        handles.clear()
        gc.collect()
        grown.append(offloader.host_bytes)
    later = [second - first for first, second in pairwise(grown[1:])]
    assert later == [0] * len(later), grown
    assert all(layers_through(offloader, seed=1000))


@pytest.mark.gpu
def test_layers_that_move_nothing_let_the_ones_before_them_leave():
    offloader = Offloader(enabled=True)
    size = 1 << 24
    before = torch.cuda.memory_allocated()
    handles = [
        offloader.push([torch.full((size,), n, dtype=torch.uint8, device="cuda")]) for n in range(IN_FLIGHT)
    ]
    for _ in range(IN_FLIGHT):
        offloader.advance()
    assert torch.cuda.memory_allocated() == before
    for number in reversed(range(IN_FLIGHT)):
        (pulled,) = offloader.pull(handles[number])
        assert torch.equal(pulled, torch.full_like(pulled, number))


def test_on_the_cpu_nothing_is_waited_for():
    offloader = Offloader(enabled=False)
    handle = offloader.push([torch.ones(2)])
    offloader.advance()
    assert torch.equal(offloader.pull(handle)[0], torch.ones(2))
