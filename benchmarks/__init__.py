"""Measurements of speed, memory and loss; RESULTS.md holds the figures."""
