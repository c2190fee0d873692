"""Our operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.kernel_peers.rows import ROWS, Peer, Prepared, named
from tunesmith.kernels.catalog import Inputs, KernelRow, Size
from tunesmith.kernels.measure import results


def own(function_of: Callable[[KernelRow], Callable[..., Any]]) -> Peer:
    """A peer of functions with the signature of our operators."""

    def of(row: KernelRow) -> Callable[[Size, Inputs], Prepared]:
        function = function_of(row)

        def prepare(size: Size, inputs: Inputs) -> Prepared:
            return Prepared(
                lambda: function(**inputs),
                lambda value: named(row.name, size, results(lambda **_: value, row, inputs)),
            )

        return prepare

    return {name: of(row) for name, row in ROWS.items()}


OWN = True  # computes all that our operators do

PEER: Peer = own(lambda row: row.op)
