"""Typed, strict, frozen settings: what a run file may say. Torch-free, so the CLI answers at once."""
