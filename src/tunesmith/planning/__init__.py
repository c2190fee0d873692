"""What fits and how fast: architecture rows, cost model and solver. Torch-free, so it answers at once."""
