"""The commands of the pages, and what becomes of each: run by `test_docs_commands.py`, or left out for a reason.

A command is a line of a ```bash block in README.md or docs/. Those of `tunesmith` run, one page after the other as a
reader would type them, in a fresh copy of one small workplace where a tiny model has been trained; whatever does not
run has to stand in `LEFT_OUT`.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

SUBSTITUTIONS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "model",
    "org/model": "model",
    "train.steps=20": "train.steps=2",
}
"""What stands for what in commands and run files: a tiny model for what a hub would give, and fewer steps."""

ADDED = {"chat": "--max-tokens 8", "generate": "--max-tokens 8"}
"""What is added to a command so that it takes a second: a model that has learned nothing does not end its answers."""

LEFT_OUT = {
    "make setup": "makes the environment that the tests run in",
    "make demo": "takes minutes and the demo's model; tests/slow/ runs it",
    "make test": "is what runs this",
    "make docs": "installs Sphinx; whoever changes a page runs it",
    'pip install ".[plot]"': "needs a network",
    'pip install "tunesmith[optimizers]"': "needs a network",
    'pip install "tunesmith[tensorboard,mlflow]"': "needs a network",
    "python benchmarks/compare.py": "needs a GPU and minutes",
    "python benchmarks/compare.py --table": "reads what the one before measured",
    "python benchmarks/compare.py --bars": "reads what the one before measured",
    "python benchmarks/plans.py --budgets 0.92 8 12 16 24 32 --policies keep recompute": "needs a GPU",
    "python benchmarks/plans.py --table --picture curve.png": "reads what the one before measured",
    "tunesmith data check https://example.org/data/train.jsonl.gz --model org/model": (
        "needs a network; tests/data/ reads addresses from a server of its own"
    ),
    "tunesmith train run.yaml 'output.track=[tensorboard, mlflow]'": (
        "mlflow takes half a minute; tests/training/test_trackers.py reads back what trackers wrote"
    ),
    "tunesmith init": "asks on a terminal; tests/cli/test_init.py answers",
}
"""Commands that do not run here, each with the reason."""

REFUSED = {
    "tunesmith inspect run.yml": "There is no file run.yml.",
    "tunesmith train run.yaml train.learning_rat=1e-3": "did you mean learning_rate?",
    "tunesmith train run.yaml train.steps=8 train.global_batch=4 train.learning_rate=1e-3": (
        "belongs to a run with other settings"
    ),
    "tunesmith merge run/second": "There is nothing to merge: run/second is no folder",
    "tunesmith runs compare runs/second": "One run alone cannot be compared.",
}
"""Mistakes that a page shows, with what is said to them; every other command ends with 0."""

SAYS = {
    "init": "wrote ",
    "inspect": "trained on",
    "train": "held-out loss",
    "plan": "It fits",
    "plan model.name=meta-llama/Llama-3.1-70B": "Llama-3.1-70B: 70",
    "data check": "rows",
    "chat": "",
    "generate": "",
    "merge": "checked ",
    "runs": "tokens/s",
    "runs compare": "settings that differ",
    "report": ".html",
    "schema": '"$schema"',
    "doctor": "Training is possible",
}
"""A word of what each command prints when it has done its work; of several names that fit, the longest counts."""


@dataclass(frozen=True)
class Command:
    """A line that a page tells the reader to type.

    Attributes:
        text: the line without its comment.
        page: where it stands.
    """

    text: str
    page: str

    @property
    def program(self) -> str:
        """Its first word."""
        return self.text.split()[0]


def read_commands(text: str, page: str) -> list[Command]:
    """The commands of a page; a line that ends in a backslash goes on in the next."""
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                comment = line.find(" #")
                found.append(Command((line if comment < 0 else line[:comment]).strip(), page))
                assert shlex.split(found[-1].text) == words, line
    return found


def commands_by_page() -> dict[str, list[Command]]:
    """The commands of each page that has some, in its order."""
    pages = {
        (page := str(path.relative_to(ROOT))): read_commands(path.read_text(encoding="utf-8"), page)
        for path in PAGES
    }
    return {page: commands for page, commands in pages.items() if commands}


def typed_words(command: Command) -> list[str]:
    """The words of a command as they are typed here."""
    words = shlex.split(substituted(command.text))
    return words + shlex.split(ADDED.get(words[1], ""))


def substituted(text: str) -> str:
    """A text with what stands for the hub's models in it."""
    for there, here in SUBSTITUTIONS.items():
        text = text.replace(there, here)
    return text
