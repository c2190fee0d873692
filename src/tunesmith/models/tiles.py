"""The MLP of a long row in tiles of tokens, so that gate and up `[T, N]` and their gradient never exist in full.

At 500,000 tokens of the 8B shape gate and up alone are 29 GB in 16 bits, and backward wants the activation's gradient
beside them; a tile of 16,384 tokens takes 1.4 GB for both. Forward and backward call the same functions as for whole
rows (`layer_mlp`), for some tokens at a time, where the policy does not keep gate and up. Nothing is computed more
often than without tiles: backward recomputes gate and up of a tile and goes on with their gradient at once. Weights
are unpacked once a pass and shared by the tiles. Gradients of everything that trains are summed over the tiles in
float32 and rounded once, and differ in the last bits from those of one product over all tokens; outputs and ∂x
are the same rows of the same products.

Dropout masks are drawn tile by tile, from the seed of the call and the number of the tile, in forward and in backward
alike: with dropout a tiled layer draws other masks than one that is not.

Rejected: tiles of columns of N instead of tokens, which read ∂out once a tile, and sum ∂x over tiles in 16 bits or in
a buffer of float32.

Shape suffixes: T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from tunesmith.models import layer_mlp
from tunesmith.models.layer_call import AllOperands, LayerCall, Stash, Weights, stage_of
from tunesmith.models.layer_weights import Gradients

TILE_TOKENS = 16_384
"""Tokens of a tile where nobody says otherwise: as many as a micro-batch takes to keep a card busy, so that the GEMMs
of a tile are as fast as those of a whole row. Shorter rows are not tiled."""
ALIGNED = 128
"""Rows of a tile are a multiple of these, the most that a block of a GEMM or a kernel has."""

_SHARED = ("gate_up", "down")


def needed(call: LayerCall) -> bool:
    """Whether this call's MLP is computed in tiles: its rows are many, and gate and up are not kept."""
    return (
        call.tile_tokens is not None
        and "gate_up" not in call.policy.keep
        and _tokens(call) > call.tile_tokens
    )


def _tokens(call: LayerCall) -> int:
    """Tokens that the MLP computes."""
    return (call.cos_TK if call.rows is None else call.rows).shape[0]


def tile_rows(tokens: int, most: int) -> list[slice]:
    """Rows of each tile: as few tiles as `most` tokens allow, of one size but for the last."""
    size = -(-tokens // -(-tokens // most))
    size = min(most, -(-size // ALIGNED) * ALIGNED)
    return [slice(first, min(first + size, tokens)) for first in range(0, tokens, size)]


def _tiles(call: LayerCall, stream_TD: Tensor) -> Iterator[tuple[slice, LayerCall, Stash]]:
    """Rows of each tile, the call as the MLP of the tile sees it, and a stash with the stream that it reads."""
    assert call.tile_tokens is not None
    for number, rows in enumerate(tile_rows(stream_TD.shape[0], call.tile_tokens)):
        # the projections of a group draw from seeds that follow each other, three at most
        qkv, output, gate_up, down = (seed + 4 * number for seed in call.seeds)
        name = "input" if call.shape.parallel else "middle"
        tile = Stash(large={name: stream_TD[rows]})
        yield rows, replace(call, rows=None, tile_tokens=None, seeds=(qkv, output, gate_up, down)), tile


def mlp_forward(
    call: LayerCall, residual_TD: Tensor, stash: Stash, operands: AllOperands, weights: Weights
) -> Tensor:
    """`layer_mlp.mlp_forward` in tiles; what the policy keeps goes into the stash, gate and up do not."""
    stream_TD = layer_mlp.mlp_input(call, stash)
    out_TD = residual_TD.new_empty(residual_TD.shape)
    with weights.shared(*_SHARED):
        for rows, tile_call, tile in _tiles(call, stream_TD):
            out_TD[rows] = layer_mlp.mlp_forward(tile_call, residual_TD[rows], tile, operands, weights)
            small = {name: part for name, part in tile.small.items() if not call.rebuilds(name)}
            _put(stash.small, small, rows, stream_TD.shape[0])
            if stage_of("branch1") in call.policy.keep and "branch1" in tile.large:
                _put(stash.large, {"branch1": tile.large["branch1"]}, rows, stream_TD.shape[0])
    return out_TD


def _put(whole: dict[str, Tensor], parts: dict[str, Tensor], rows: slice, tokens: int) -> None:
    """Copy the rows of a tile into tensors that have room for all of them."""
    for name, part in parts.items():
        if rows.start == 0:
            whole[name] = part.new_empty(tokens, *part.shape[1:])
        whole[name][rows] = part


def mlp_backward(
    call: LayerCall,
    grad_TD: Tensor,
    stash: Stash,
    operands: AllOperands,
    weights: Weights,
    found: Gradients,
) -> Tensor:
    """`layer_mlp.mlp_backward` in tiles, from what `mlp_forward` left; gate and up are computed again in each."""
    stream_TD = layer_mlp.mlp_input(call, stash)
    grad_stream_TD = grad_TD.new_empty(grad_TD.shape)
    branch_TD = stash.large.pop("branch1", None)
    small = {name: stash.small[name] for name in ("u_down", "behind1") if name in stash.small}
    sums = Gradients(wide=True)
    with weights.shared(*_SHARED):
        for rows, tile_call, tile in _tiles(call, stream_TD):
            tile.small |= {name: whole[rows] for name, whole in small.items()}
            if branch_TD is not None:
                tile.large["branch1"] = branch_TD[rows]
            layer_mlp.mlp_again(tile_call, tile, operands, weights)
            part = Gradients(wide=True)
            grad_stream_TD[rows] = layer_mlp.mlp_backward(
                tile_call, grad_TD[rows], tile, operands, weights, part
            )
            sums.add(part)
    found.take(sums, call.groups, call.norms)
    return grad_stream_TD
