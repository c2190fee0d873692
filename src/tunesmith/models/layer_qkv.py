"""From the fused q, k, v buffer that the GEMM wrote to the one that attention reads, and back.

Without norms on q and k the adapters and the rotary positions go into the buffer in place, and it is kept as
attention reads it. With them the buffer is kept as the GEMM wrote it, and the pass that norms and rotates into
another one is made again in backward: as many bytes are kept, and nothing is divided by weights.

Shape suffixes: T tokens, N columns of qkv, K columns of a table, Q ranks of the group's projections.
"""

from __future__ import annotations

from torch import Tensor

from tunesmith.kernels.qk_norm import Adapter, Norms, qk_norm_rope, qk_norm_rope_backward_
from tunesmith.kernels.rope import rope_qkv_
from tunesmith.models.layer_call import LayerCall, Stash
from tunesmith.models.layer_weights import Gradients
from tunesmith.models.projections import Operands


def _rotate_(
    call: LayerCall, qkv_TN: Tensor, *, inverse: bool = False, adapter: Adapter | None = None
) -> None:
    layout = call.layout
    xa_TR, b_NR, rank = (None, None, 0) if adapter is None else adapter[:3]
    rope_qkv_(
        qkv_TN, call.cos_TK, call.sin_TK,
        heads=layout.heads, kv_heads=layout.kv_heads, head_dim=layout.head_dim, rotary_dim=layout.rotary_dim,
        inverse=inverse, xa_TR=xa_TR, b_NR=b_NR, rank=rank, interleaved=layout.interleaved,
    )  # fmt: skip


def _norms(call: LayerCall) -> Norms | None:
    q, k, shape = call.norms.q, call.norms.k, call.shape
    if q is None or k is None:
        return None
    return Norms(q.weight, k.weight, shape.eps, shape.norm_offset, shape.qk_full)


def _adapter(call: LayerCall, stash: Stash, operands: Operands | None) -> Adapter | None:
    if operands is None:
        return None
    return Adapter(stash.small["u_qkv"], operands.b_NR, call.groups.qkv.rank)


def kept_form_(call: LayerCall, qkv_TN: Tensor, stash: Stash, operands: Operands | None) -> Tensor:
    """The buffer as it is kept, from the one that the GEMM wrote, in place."""
    adapter = _adapter(call, stash, operands)
    if call.norms.q is None and (call.shape.rope or adapter is not None):
        _rotate_(call, qkv_TN, adapter=adapter)
    return qkv_TN


def for_attention(call: LayerCall, stash: Stash, operands: Operands | None) -> Tensor:
    """q, k and v as attention reads them, from the buffer that is kept."""
    qkv_TN = stash.large["qkv"]
    norms = _norms(call)
    if norms is None:
        return qkv_TN
    adapter = _adapter(call, stash, operands)
    return qk_norm_rope(qkv_TN, call.cos_TK, call.sin_TK, call.layout, norms, adapter)


def gradient_(
    call: LayerCall, grad_TN: Tensor, stash: Stash, operands: Operands | None, found: Gradients
) -> None:
    """∂ of what attention read becomes ∂ of what the GEMM and the adapters summed to, in place."""
    norms, q, k = _norms(call), call.norms.q, call.norms.k
    if norms is not None:
        assert q is not None
        assert k is not None
        adapter = _adapter(call, stash, operands)
        sums = qk_norm_rope_backward_(
            grad_TN, stash.large["qkv"], call.cos_TK, call.sin_TK, call.layout, norms, adapter,
            weight_grad=q.trains or k.trains,
        )  # fmt: skip
        if sums is not None:
            found.put_norm("q", q, sums[0])
            found.put_norm("k", k, sums[1])
    elif call.shape.rope:
        _rotate_(call, grad_TN, inverse=True)
