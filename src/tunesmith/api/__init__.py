"""The Python interface."""

from tunesmith.training.quiet import quiet_imports

quiet_imports()
