"""The training loop: steps, optimizers, checkpoints and metrics of one run, read top to bottom."""
