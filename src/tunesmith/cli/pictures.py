"""The histogram of `tunesmith data check` as SVG. It draws numbers and decides nothing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_WIDTH, _HEIGHT, _BOTTOM, _TOP = 720, 220, 34, 16
_BINS = 4
"""Bars of a doubling of the length."""


def histogram(lengths: NDArray[np.int64], limit: int) -> str:
    """Rows by their number of tokens, on a logarithmic axis, with a line at the longest that fits."""
    if not lengths.size:
        return ""
    # a bar holds what is longer than its left end, and its right end: what just fits is left of the line
    steps = np.ceil(np.log2(np.maximum(lengths, 1)) * _BINS).astype(np.int64) - 1
    first, last = int(steps.min()), max(int(steps.max()), int(np.ceil(np.log2(limit) * _BINS)) - 1)
    first = min(first, last - 2 * _BINS)  # a picture of one bar shows nothing
    counts = np.bincount(steps - first, minlength=last - first + 1)
    width, most = _WIDTH / len(counts), int(counts.max())
    room = _HEIGHT - _BOTTOM - _TOP

    def place(tokens: float) -> float:
        return float((np.log2(tokens) * _BINS - first) * width)

    drawn = []
    for number, count in enumerate(counts.tolist()):
        if not count:
            continue
        low, high = (int(2 ** ((first + number + more) / _BINS)) for more in (0, 1))
        tall = max(1.5, count / most * room)
        kind = "long" if low >= limit else "fits"
        drawn.append(
            f'<rect class="{kind}" x="{number * width + 0.5:.1f}" y="{_HEIGHT - _BOTTOM - tall:.1f}" '
            f'width="{width - 1:.1f}" height="{tall:.1f}"><title>{low + 1:,} to {high:,} tokens: {count:,}'
            "</title></rect>"
        )
    powers = range(int(np.ceil(first / _BINS)), (last + 1) // _BINS + 1)
    every = max(1, len(powers) // 9)
    for power in [power for power in powers if power >= 0][::every]:
        drawn.append(f'<text x="{place(2**power):.1f}" y="{_HEIGHT - 14}">{2**power:,}</text>')
    if first / _BINS <= np.log2(limit) <= (last + 1) / _BINS:
        x = min(place(limit), _WIDTH - 1)
        side = "end" if x > _WIDTH / 2 else "start"
        shift = -6 if side == "end" else 6
        drawn.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{_HEIGHT - _BOTTOM}"/>')
        drawn.append(
            f'<text class="limit" style="text-anchor:{side}" x="{x + shift:.1f}" y="11">{limit:,} fit</text>'
        )
    drawn.append(
        f'<line class="axis" x1="0" x2="{_WIDTH}" y1="{_HEIGHT - _BOTTOM}" y2="{_HEIGHT - _BOTTOM}"/>'
    )
    label = f"{len(lengths):,} documents by length: {int(lengths.min()):,} to {int(lengths.max()):,} tokens"
    return (
        f'<svg viewBox="-14 0 {_WIDTH + 28} {_HEIGHT}" role="img" aria-label="{label}">{"".join(drawn)}'
        f'<text class="unit" x="{_WIDTH / 2}" y="{_HEIGHT - 1}">tokens a document</text></svg>'
    )
