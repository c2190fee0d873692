"""Weights in few bits: storage formats, and the way back to the precision of the computation."""
