"""`python -m tunesmith`."""

from tunesmith.cli.main import run

run()
