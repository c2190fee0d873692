"""What fits, and what is known about architectures. Torch-free, so it answers at once."""
