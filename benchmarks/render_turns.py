"""Milliseconds to render, mask and prove a conversation of many turns, and how the time grows with the turns.

    .venv/bin/python -m benchmarks.render_turns [--turns 1000] [--repeat 5]

For each template: the time of a row of new shape (its prompts are proved), of a row of known shape, and of
rendering every prefix, which others do. Linear means that twice the turns take twice the time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

from tests.data.chat_templates import ALL, chat_tokenizer

from tunesmith.data.formats import Conversation
from tunesmith.data.named_templates import TEMPLATES
from tunesmith.data.render import Renderer

WORDS = "the quick brown fox jumps over the lazy dog " * 5
ROLES = ("user", "assistant")
CHOSEN = {
    "llama-3": TEMPLATES["llama-3"].text,
    "qwen-3": TEMPLATES["qwen-3"].text,
    "gpt-oss": TEMPLATES["gpt-oss"].text,
    "turns hidden": ALL["indexed"],
}


def conversation(turns: int, mark: str) -> Conversation:
    """A conversation of `turns` messages; another `mark` makes it another shape."""
    return Conversation([{"role": ROLES[n % 2], "content": f"{n} {WORDS}", mark: "x"} for n in range(turns)])


def milliseconds(call: Callable[[int], Any], repeat: int) -> float:
    """The best of `repeat` calls."""
    best = float("inf")
    for number in range(repeat):
        start = time.perf_counter()
        call(number)
        best = min(best, time.perf_counter() - start)
    return best * 1000


def every_prefix(renderer: Renderer, item: Conversation) -> None:
    """What a mask costs that is found by rendering each prefix."""
    assert renderer.template is not None
    for count in range(1, len(item.messages) + 1):
        renderer.template.render(item.messages[:count])


def measure(renderer: Renderer, turns: int, repeat: int) -> tuple[float, float, float]:
    """Milliseconds of a new shape, of a known one, and of every prefix."""
    new = milliseconds(lambda number: renderer.render(conversation(turns, f"new{turns}{number}")), repeat)
    item = conversation(turns, "known")
    renderer.render(item)
    known = milliseconds(lambda _: renderer.render(item), repeat)
    return new, known, milliseconds(lambda _: every_prefix(renderer, item), 1)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=1000)
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{'template':<14}{'turns':>7}{'new shape':>12}{'known shape':>13}{'every prefix':>14}   (ms)")
    for name, text in CHOSEN.items():
        renderer = Renderer(chat_tokenizer(text), text)
        for turns in (arguments.turns // 2, arguments.turns):
            times = measure(renderer, turns, arguments.repeat)
            print(f"{name:<14}{turns:>7}{times[0]:>12.1f}{times[1]:>13.1f}{times[2]:>14.0f}")


if __name__ == "__main__":
    main()
