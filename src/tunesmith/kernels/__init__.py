"""The computations that were written for speed, each beside its plain torch reference."""
