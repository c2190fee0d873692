"""Plain torch, one operation after the other: the references of our operators, which compute in float32."""

from __future__ import annotations

from benchmarks.kernel_peers.rows import Peer
from benchmarks.kernel_peers.with_tunesmith import own

OWN = True  # computes all that our operators do

PEER: Peer = own(lambda row: row.reference)
