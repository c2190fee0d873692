"""What `compare.py` measures, and how each system does its step; one process for each system and case."""
