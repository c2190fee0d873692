"""Tests that take minutes: the real model of the demo, on real data."""
