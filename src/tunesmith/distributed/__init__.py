"""Engines that carry a step over devices, behind one `Backend`; `single` is the first row."""
