"""bitsandbytes' own dequantisation of NF4, which transformers and PEFT run."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit

from benchmarks.kernel_peers.rows import Peer, Prepared, result
from tunesmith.kernels.catalog import Inputs, Size


def quant_state(inputs: Inputs) -> QuantState:
    """The scales of a case in bitsandbytes' form."""
    out_NK, nested = inputs["out_NK"], inputs["nested"]
    more: dict[str, Any] = {"absmax": inputs["absmax"]}
    if nested is not None:
        absmax_u8, absmax2, code2, offset, blocksize2 = nested
        second = QuantState(absmax=absmax2, code=code2, blocksize=blocksize2, dtype=torch.float32)
        more = {"absmax": absmax_u8, "offset": offset, "state2": second}
    return QuantState(
        shape=torch.Size(out_NK.shape),
        code=inputs["code"],
        blocksize=inputs["blocksize"],
        quant_type="nf4",
        dtype=out_NK.dtype,
        **more,
    )


def _dequantize(_size: Size, inputs: Inputs) -> Prepared:
    packed, state = inputs["packed"], quant_state(inputs)
    return Prepared(lambda: dequantize_4bit(packed, state), result)


PEER: Peer = {"dequantize_nf4": _dequantize}
