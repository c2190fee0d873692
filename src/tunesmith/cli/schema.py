"""`tunesmith schema`: the JSON Schema of a run file on standard output."""

from __future__ import annotations

import json

from tunesmith.config.schema import run_file_schema


def print_schema() -> None:
    """Print the schema as JSON, in ASCII, so that it is the same file in every locale."""
    print(json.dumps(run_file_schema(), indent=2))
