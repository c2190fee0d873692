"""Chat templates, compiled so that one rendering also tells where each message stands in the text.

A chat template is a Jinja program that writes a whole conversation. Which characters an assistant wrote is
not part of its result, so others render every prefix of the conversation and compare (quadratic, and wrong
where a template looks ahead with `loop.last`), or search for headers in the text (wrong where a user quotes
one). Ours reads it off the program while it runs:

- into the body of every `for` loop goes a call of a hidden function with the loop's variable, and behind
  every loop a call that says it is over;
- Jinja hands out its output piece by piece, so at each such call the number of characters written is known;
- a message is recognised by its identity, which slices, filters and assignments preserve.

A message's span is what was written from the beginning of its iteration until the next iteration begins or
the loop is left, also where `continue` or `break` skips the rest of the body. Loops that only look at the
messages write nothing and give empty spans. `{% generation %}` blocks are marked in the same way.

Templates are foreign code: they run in a sandbox (`sandbox.py`), with a bound on iterations and on text, and
whatever they raise is reported as a problem of the row.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.parser import Parser

from tunesmith.contracts.errors import DataError
from tunesmith.data.chat import RowProblem
from tunesmith.data.sandbox import Sandbox, Trusted, bound_growth, bounded_filters, start_rendering

Span = tuple[int, int]
"""First character and the character behind the last one."""

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The ChatML template, for tokenizers that have none of their own."""

FIXED_DATE = "2025-01-01"
"""The day that templates write unless `data.date` names another."""

_MARK = "tunesmith_mark"
_NEXT, _LEAVE, _OPEN, _CLOSE = range(4)

_MOST_EVENTS = 2_000_000
_MOST_CHARACTERS = 1 << 28

_WIDEST_INDENT = 16

_FOREIGN = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a template may raise on unexpected data; anything else is a defect of ours."""


@dataclass(frozen=True)
class Trace:
    """The result of one rendering.

    Attributes:
        text: all that was written.
        messages: the span of each message, empty where the template wrote it at no place of its own.
        generation: spans of the template's `{% generation %}` blocks.
        events: number of marker calls, a measure of the work done.
    """

    text: str
    messages: list[Span]
    generation: list[Span]
    events: int


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` around what the assistant wrote, as transformers has it."""

    tags = {"generation"}  # noqa: RUF012 the attribute that Jinja reads

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        scope = nodes.Scope(body, lineno=line)
        return [_call(line, _OPEN, 0, None), scope, _call(line, _CLOSE, 0, None)]


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models read it: no HTML escapes, and letters of every script as they are."""
    if indent is not None and indent > _WIDEST_INDENT:
        raise SecurityError(f"an indent of more than {_WIDEST_INDENT}")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.cache
def _environment() -> Sandbox:
    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.filters.update(bounded_filters())
    environment.globals.update(raise_exception=_raise)
    del environment.globals["lipsum"]  # text by the kilometre, and no template of a model wants it
    return environment


def _call(line: int, event: int, loop: int, variable: str | None) -> nodes.ExprStmt:
    """The statement that reports an event to the tracker of the running rendering."""
    value: nodes.Expr = nodes.Const(None) if variable is None else nodes.Name(variable, "load")
    arguments = [nodes.Const(event), nodes.Const(loop), value]
    call = nodes.Call(nodes.Name(_MARK, "load"), arguments, [], None, None)
    statement = nodes.ExprStmt(call)
    statement.set_lineno(line, override=True)
    return statement


def _mark_loops(node: nodes.Node, numbers: Iterator[int]) -> None:
    """Put the marker calls into every loop below `node`, in place."""
    for field, children in node.iter_fields():
        if isinstance(children, nodes.Node):
            _mark_loops(children, numbers)
        if not isinstance(children, list):
            continue
        marked: list[Any] = []
        for child in children:
            marked.append(child)
            if isinstance(child, nodes.Node):
                _mark_loops(child, numbers)
            if isinstance(child, nodes.For):
                number = next(numbers)
                variable = child.target.name if isinstance(child.target, nodes.Name) else None
                child.body.insert(0, _call(child.lineno, _NEXT, number, variable))
                marked.append(_call(child.lineno, _LEAVE, number, None))
        setattr(node, field, marked)


_LOOKING = frozenset(
    {
        "startswith",
        "endswith",
        "split",
        "rsplit",
        "find",
        "rfind",
        "index",
        "count",
        "partition",
        "rpartition",
    }
)


def _looked_for(tree: nodes.Node) -> tuple[str, ...]:
    """Strings that a template looks for in a text: operands of `in`, arguments of `split` and the like."""
    found: set[str] = set()
    for compare in tree.find_all(nodes.Compare):
        if any(operand.op in ("in", "notin") for operand in compare.ops):
            found.add(getattr(compare.expr, "value", ""))
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr in _LOOKING:
            found.update(getattr(argument, "value", "") for argument in call.args)
    return tuple(sorted(text for text in found if isinstance(text, str) and text))


class _Tracker(Trusted):
    """Follows one rendering: how much is written, and whose iteration is running in which loop."""

    def __init__(self, messages: Sequence[Mapping[str, Any]]) -> None:
        self.position = 0
        self.events = 0
        self.spans: list[Span] = [(0, 0)] * len(messages)
        self.generation: list[Span] = []
        self._numbers = {id(message): number for number, message in enumerate(messages)}
        self._running: dict[int, tuple[int, int]] = {}
        self._opened = 0

    def __call__(self, event: int, loop: int, value: Any) -> None:
        """What the marker calls in the template call."""
        self.events += 1
        if self.events > _MOST_EVENTS:
            raise SecurityError(f"more than {_MOST_EVENTS} iterations")
        if event in (_NEXT, _LEAVE):
            self._end_iteration(loop)
        if event == _NEXT and id(value) in self._numbers:
            self._running[loop] = (self._numbers[id(value)], self.position)
        elif event == _OPEN:
            self._opened = self.position
        elif event == _CLOSE and self.position > self._opened:
            self.generation.append((self._opened, self.position))

    def _end_iteration(self, loop: int) -> None:
        running = self._running.pop(loop, None)
        if running is None:
            return
        number, start = running
        before = self.spans[number]
        if self.position - start > before[1] - before[0]:
            self.spans[number] = (start, self.position)


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: its text.
        date: the day that `strftime_now` tells, so that the same row is the same text on every day.

    Attributes:
        source: its text.
        names: variables that it reads, such as `tools`.
        keys: attributes, keys and other string constants in it, such as `reasoning_content`.
        needles: strings that it looks for in a text, such as `</think>`.
        renderings: how often it was rendered.
        written: characters that it wrote in all renderings; the work done is linear in it.

    Raises:
        DataError: where the template is not valid Jinja.
    """

    def __init__(self, source: str, date: datetime | None = None) -> None:
        self.source = source
        self.renderings = 0
        self.written = 0
        self._now = (date or datetime.fromisoformat(FIXED_DATE)).strftime
        environment = _environment()
        try:
            tree = environment.parse(source)
            self.names = frozenset(node.name for node in tree.find_all(nodes.Name))
            self.keys = frozenset(
                [node.attr for node in tree.find_all(nodes.Getattr)]
                + [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
            )
            self.needles = _looked_for(tree)
            _mark_loops(tree, iter(range(1, 1 << 30)))
            bound_growth(tree)
            tree.set_environment(environment)
            code = environment.compile(tree)
            self._template = jinja2.Template.from_code(environment, code, dict(environment.globals))
        except TemplateSyntaxError as error:
            raise DataError(
                f"The chat template is not valid Jinja at line {error.lineno}: {error.message}.",
                hint="Mend the template, or choose another one with `data.template`.",
            ) from error
        except (TemplateError, RecursionError) as error:
            raise DataError(f"The chat template cannot be compiled: {error}.") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> Trace:
        """Write a conversation and find its messages in the text.

        Args:
            messages: distinct dict objects; their identity is what is followed.
            tools: signatures of the tools.
            variables: further variables, such as the tokenizer's `bos_token`.
            add_generation_prompt: end with the header of a turn that is still to be written.

        Raises:
            RowProblem: "template error" where the template fails on this conversation.
        """
        self.renderings += 1
        tracker = _Tracker(messages)
        values = {
            **(variables or {}),
            "messages": list(messages),
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "strftime_now": self._now,
            _MARK: tracker,
        }
        pieces: list[str] = []
        start_rendering()
        try:
            for piece in self._template.generate(values):
                pieces.append(piece)
                tracker.position += len(piece)
                if tracker.position > _MOST_CHARACTERS:
                    raise SecurityError(f"more than {_MOST_CHARACTERS} characters")
        except _FOREIGN as error:
            raise RowProblem("template error", f"{error or type(error).__name__}") from error
        self.written += tracker.position
        return Trace("".join(pieces), tracker.spans, tracker.generation, tracker.events)
