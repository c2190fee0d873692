"""What leaves a run: the adapter or model as plain transformers and PEFT load it, and its card."""
