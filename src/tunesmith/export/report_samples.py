"""What the model answered, before, while and after it was trained, in the report of a run. Torch-free."""

from __future__ import annotations

from typing import Any

from tunesmith.contracts.plural import counted
from tunesmith.export.curves import Events, of_kind
from tunesmith.export.page import escape

_MOST_PROMPTS, _MOST_ANSWERS, _MOST_LETTERS = 10, 6, 1_500


def samples_html(events: Events, answers: dict[str, Any]) -> str:
    """Each prompt with its answers in the order of time.

    Args:
        events: those of the kind `sample` are shown.
        answers: what `answers.json` of a run directory holds: answers before and after training.
    """
    found = _by_prompt(events, answers)
    if not found:
        return ""
    shown = "".join(_prompt(prompt, said) for prompt, said in list(found.items())[:_MOST_PROMPTS])
    more = len(found) - _MOST_PROMPTS
    note = f'<p class="faint">and {counted(more, "further prompt")}</p>' if more > 0 else ""
    return f"<h2>Samples</h2>{shown}{note}"


def _by_prompt(events: Events, answers: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """(when, answer) by prompt."""
    found: dict[str, list[tuple[str, str]]] = {}
    for event in of_kind(events, "sample"):
        said = found.setdefault(str(event.get("prompt")), [])
        said.append((f"step {event['step']:,}", str(event.get("answer"))))
    lists = [answers.get(name) for name in ("questions", "before", "after")]
    questions, before, after = (value if isinstance(value, list) else [] for value in lists)
    for number, question in enumerate(questions):
        said = found.setdefault(str(question), [])
        for when, texts in (("before training", before), ("after training", after)):
            if number < len(texts):
                said.append((when, str(texts[number])))
    return found


def _prompt(prompt: str, answers: list[tuple[str, str]]) -> str:
    """A prompt with its first and last answers and some between them."""
    last = len(answers) - 1
    kept = (
        sorted({round(place * last / (_MOST_ANSWERS - 1)) for place in range(_MOST_ANSWERS)}) if last else [0]
    )
    lines = "".join(
        f"<h4>{escape(when)}</h4><p>{_cut(text)}</p>" for when, text in (answers[i] for i in kept)
    )
    left_out = len(answers) - len(kept)
    note = f'<p class="faint">{counted(left_out, "answer")} between them left out</p>' if left_out else ""
    return f'<div class="say"><h4>prompt</h4><p>{_cut(prompt)}</p>{lines}{note}</div>'


def _cut(text: str) -> str:
    if len(text) <= _MOST_LETTERS:
        return escape(text) or '<span class="faint">(empty)</span>'
    return f'{escape(text[:_MOST_LETTERS])}… <span class="faint">(cut, {len(text):,} characters)</span>'
