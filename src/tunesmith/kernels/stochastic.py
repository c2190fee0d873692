"""Random words that do not depend on the grid, and rounding to bfloat16 with them, in Triton and in plain torch.

A weight in bfloat16 has 8 bits: a step below 2⁻⁹ of it is lost for good when the sum is rounded to the nearest, and
most steps of a fine-tuning run are smaller. Rounded up with the probability of the part that is cut off, the sum is
right on average, and many small steps add up to what they would be in float32.

The words are those of the counter-based generator Philox 4x32 with seven rounds (J. Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011): a pure function of seed, step, tensor and element. A run that goes on from a
checkpoint draws the same words, whatever the size of a block, and no generator has a state to save. One call gives
the words of four elements, 5 multiplications an element instead of 20.

Rejected: torch's generators, whose numbers depend on the launch, and whose state is another thing to restore.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.kernels.launch import jit, tl

ROUNDS = 7
"""The fewest that pass every test of the paper; the kernel has the number as a literal."""
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


@jit()
def random_words(seed, step, tensor, first, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """uint32 `[BLOCK]`, the words of elements `first`, `first` + 1, …; `first` is a multiple of 4, in 64 bits."""
    quad = first // 4 + tl.arange(0, BLOCK // 4)
    low = quad.to(tl.uint32)
    zero = low * 0
    word0, word1, word2, word3 = tl.philox(
        seed, low, zero + step.to(tl.uint32), zero + tensor.to(tl.uint32), (quad >> 32).to(tl.uint32), 7
    )
    # joined axes come last, the first joined outermost: 0, 1, 2, 3 of each four lie side by side
    return tl.reshape(tl.join(tl.join(word0, word2), tl.join(word1, word3)), (BLOCK,))


@jit()
def to_bfloat16(value, word):  # type: ignore[no-untyped-def]
    """float32 rounded to one of its two neighbours in bfloat16 with the upper 16 bits of a random word.

    The cut part plus 16 random bits carries into the kept part as often as the cut part is large.
    """
    kept = (value.to(tl.uint32, bitcast=True) + (word >> 16)) & 0xFFFF0000
    # a NaN could carry into its sign and become a zero
    return tl.where(value == value, kept.to(tl.float32, bitcast=True), value).to(tl.bfloat16)


def philox(seed: int, counter: tuple[Tensor, ...], rounds: int = ROUNDS) -> tuple[Tensor, ...]:
    """Philox 4x32 in plain torch.

    Args:
        seed: 64 bits, the key.
        counter: four int64 tensors with values of 32 bits.

    Returns:
        Four int64 tensors with words of 32 bits.
    """
    c0, c1, c2, c3 = counter
    key0, key1 = seed & _MASK, seed >> 32 & _MASK
    for _ in range(rounds):
        # int64 wraps around: the lower 64 bits of a product are right, and the mask takes away the shifted sign
        even, odd = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = (odd >> 32 & _MASK) ^ c1 ^ key0, (even >> 32 & _MASK) ^ c3 ^ key1
        c1, c3 = odd & _MASK, even & _MASK
        key0, key1 = key0 + _WEYL[0] & _MASK, key1 + _WEYL[1] & _MASK
    return c0, c1, c2, c3


def random_words_reference(seed: int, step: Tensor, tensor: int, elements: range) -> Tensor:
    """int64 words of 32 bits, one for each of these elements; the first is a multiple of 4.

    Args:
        step: a whole number on the device of the result.
    """
    quad = torch.arange(elements.start // 4, -(-elements.stop // 4), device=step.device)
    zero = torch.zeros_like(quad)
    words = philox(seed, (quad & _MASK, zero + step.long(), zero + tensor, quad >> 32))
    return torch.stack(words, -1).view(-1)[: len(elements)]


def to_bfloat16_reference(value: Tensor, word: Tensor) -> Tensor:
    """`to_bfloat16` in plain torch; value float32, words int64."""
    kept = (value.view(torch.int32) + (word >> 16).to(torch.int32)) & -0x10000
    return torch.where(value.isnan(), value, kept.view(torch.float32)).to(torch.bfloat16)
