"""What leaves a run: merged weights, GGUF files and model cards, each checked against what was trained."""
