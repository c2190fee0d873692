"""The sandbox of chat templates: Jinja's own, with a bound on every way in which text can grow.

Jinja's sandbox keeps a template from reaching the machine, but not from filling its memory: `x ~ x` in a loop
doubles, `'%999999999d' % 1` is one short expression. What is written out is counted as it is written (see
`template.py`); here stands what grows before that: operators, blocks that are captured, filters and methods of
strings. Each of them charges the characters it makes to the budget of the rendering, before it makes them.

A sum inside `{{ ... }}` goes straight to the output and cannot come back to grow again, so it stays the bare
Python operator. Everywhere else `bound_growth` turns `+` and `~` into filters, whose names no template can
shadow. Rejected: intercepting every `+`, which costs a third of the time of a rendering, and a process with a
memory limit, which costs a copy of each row.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import BuiltinMethodType
from typing import Any

from jinja2 import nodes, pass_eval_context
from jinja2.exceptions import SecurityError
from jinja2.filters import FILTERS
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST_GROWTH = 1 << 28
"""Characters that one rendering may build besides its output; a row of 10 MB passes through several filters."""

MOST_CALLS = 200_000
"""Calls that one rendering may make: macros can call themselves. A row of 1,000 turns makes some thousands."""

_LONGEST_REPEAT = 1 << 20
_LARGEST_POWER = 4096
_LARGEST_NUMBER = 1 << 16
"""Most that a width, a count of blanks or a precision may be."""

_BYTES_OF_AN_ITEM = 8

_DIGITS = re.compile(r"\d+")
_NESTED = re.compile(r":[^{}]*\{")
_ADD, _CONCAT = "tunesmith_add", "tunesmith_concat"


class _Spent(threading.local):
    """Characters that the rendering in this thread has built, and calls that it has made."""

    characters = 0
    calls = 0


_SPENT = _Spent()


def start_rendering() -> None:
    """Give the rendering that begins in this thread its budget."""
    _SPENT.characters = 0
    _SPENT.calls = 0


def _charge(characters: int) -> None:
    _SPENT.characters += characters
    if _SPENT.characters > MOST_GROWTH:
        raise SecurityError(f"more than {MOST_GROWTH} characters are built")


def _small(*values: Any) -> None:
    for value in values:
        if isinstance(value, int) and value > _LARGEST_NUMBER:
            raise SecurityError(f"a width of more than {_LARGEST_NUMBER}")


def _check_pattern(pattern: Any, values: Iterable[Any]) -> None:
    """Charge what a pattern of `%` or `format` can make of `values` at most."""
    text, values = str(pattern), list(values)
    widths = [int(digits) for digits in _DIGITS.findall(text[: 1 << 16]) if _small_digits(digits)]
    _small(*widths)
    if "*" in text or _NESTED.search(text):  # a width from the values
        _small(*values)
    longest = max((len(value) if isinstance(value, str) else 64 for value in values), default=0)
    fields = text.count("%") + text.count("{")
    _charge(len(text) + fields * longest + sum(widths))


def _small_digits(digits: str) -> bool:
    if len(digits) > 9:
        raise SecurityError(f"a width of more than {_LARGEST_NUMBER}")
    return True


def _values(arguments: Any) -> list[Any]:
    if isinstance(arguments, Mapping):
        return list(arguments.values())
    return list(arguments) if isinstance(arguments, tuple | list) else [arguments]


def _check_replace(text: Any, old: Any, new: Any, *_: Any) -> None:
    text, old, new = str(text), str(old), str(new)
    places = text.count(old) if old else len(text) + 1
    _charge(len(text) + places * len(new))


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str) else 0


def _join(separator: str, items: Iterable[Any]) -> list[Any]:
    kept = list(items)
    _charge(sum(map(_length, kept)) + len(separator) * len(kept))
    return kept


def _widened(text: str, *widths: Any) -> None:
    _small(*widths)
    _charge(len(text) + sum(width for width in widths if isinstance(width, int)))


def _expand(text: str, tabs: Any = 8) -> None:
    _small(tabs)
    _charge(len(text) + text.count("\t") * int(tabs))


_METHODS: dict[str, Callable[..., Any]] = {
    "center": lambda text, width, *_: _widened(text, width),
    "ljust": lambda text, width, *_: _widened(text, width),
    "rjust": lambda text, width, *_: _widened(text, width),
    "zfill": lambda text, width: _widened(text, width),
    "expandtabs": _expand,
    "replace": _check_replace,
    "translate": lambda text, table: _charge(len(text) * (1 + max(map(_length, _values(table)), default=0))),
    "format": lambda text, *values, **named: _check_pattern(text, [*values, *named.values()]),
    "format_map": lambda text, values: _check_pattern(text, _values(values)),
}
"""Methods of strings that can make more than they are given, and what is checked before each."""


def _checked_method(name: str, method: Callable[..., Any], text: str) -> Callable[..., Any]:
    if name == "join":
        return lambda items: method(_join(text, items))

    def checked(*values: Any, **named: Any) -> Any:
        _METHODS[name](text, *values, **named)
        return method(*values, **named)

    return checked


class Trusted:
    """A callable of ours in a template's variables, which needs none of the sandbox's checks."""

    def __call__(self, *values: Any) -> None:
        raise NotImplementedError


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with a budget for text; `start_rendering` refills it."""

    intercepted_binops = frozenset({"*", "**", "%"})

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """What joins the pieces of a captured block or macro."""
        kept = list(pieces)
        _charge(sum(map(len, kept)))
        return "".join(kept)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        if isinstance(__obj, Trusted):
            return __obj(*args)
        _SPENT.calls += 1
        if _SPENT.calls > MOST_CALLS:
            raise SecurityError(f"more than {MOST_CALLS} calls")
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and isinstance(left, int) and left.bit_length() * right > _LARGEST_POWER:
            raise SecurityError(f"a power of more than {_LARGEST_POWER} bits")
        if operator == "*":
            if isinstance(left, int) and isinstance(right, int):
                if left.bit_length() + right.bit_length() > _LARGEST_POWER:
                    raise SecurityError(f"a product of more than {_LARGEST_POWER} bits")
                return left * right
            size = _repeated(left, right) + _repeated(right, left)
            if size > _LONGEST_REPEAT:
                raise SecurityError(f"a repetition of more than {_LONGEST_REPEAT} items")
            _charge(size)
        if operator == "%" and isinstance(left, str):
            _check_pattern(left, _values(right))
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """The checked form of a method of a string; Jinja asks at each access to an attribute."""
        if not isinstance(value, BuiltinMethodType) or not isinstance(value.__self__, str):
            return None
        name = value.__name__
        if name != "join" and name not in _METHODS:
            return None
        return _checked_method(name, super().wrap_str_format(value) or value, value.__self__)


def _repeated(sequence: Any, times: Any) -> int:
    return len(sequence) * times if isinstance(sequence, str | list | tuple) and isinstance(times, int) else 0


# ---- filters ----------------------------------------------------------------------------------------------


def _add(left: Any, right: Any) -> Any:
    if isinstance(left, str):
        _charge(len(left) + _length(right))
    elif isinstance(left, list | tuple) and isinstance(right, list | tuple):
        _charge(_BYTES_OF_AN_ITEM * (len(left) + len(right)))
    return left + right


def _concat(left: Any, right: Any) -> str:
    text, more = str(left), str(right)
    _charge(len(text) + len(more))
    return text + more


def _center(value: Any, width: int = 80) -> str:
    text = str(value)
    _widened(text, width)
    return text.center(width)


@pass_eval_context
def _replace(eval_ctx: Any, s: Any, old: Any, new: Any, count: int | None = None) -> Any:
    _check_replace(s, old, new)
    return FILTERS["replace"](eval_ctx, s, old, new, count)


def _format(value: Any, *args: Any, **kwargs: Any) -> Any:
    _check_pattern(value, [*args, *kwargs.values()])
    return FILTERS["format"](value, *args, **kwargs)


def _indent(s: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> Any:
    _small(width)
    _charge(len(str(s)) + (str(s).count("\n") + 1) * (len(width) if isinstance(width, str) else width))
    return FILTERS["indent"](s, width, first, blank)


@pass_eval_context
def _join_filter(eval_ctx: Any, value: Any, d: str = "", attribute: Any = None) -> Any:
    items = _join(str(d), value) if attribute is None else _counted(str(d), value)
    return FILTERS["join"](eval_ctx, items, d, attribute)


def _counted(separator: str, value: Iterable[Any]) -> list[Any]:
    """Items of which an attribute is joined: each charged with all the text that it holds."""
    items = list(value)
    texts = [sum(map(_length, _values(item))) for item in items]
    _charge(sum(texts) + len(separator) * len(items))
    return items


def bounded_filters() -> dict[str, Callable[..., Any]]:
    """The filters that take the place of Jinja's own."""
    return {
        _ADD: _add,
        _CONCAT: _concat,
        "center": _center,
        "replace": _replace,
        "format": _format,
        "indent": _indent,
        "join": _join_filter,
    }


# ---- the tree of a template -------------------------------------------------------------------------------


def bound_growth(tree: nodes.Node) -> None:
    """Turn each `+` and `~` of a template whose result can be kept into its checked form, in place."""
    _bound_below(tree, written=False)


def _bound_below(node: nodes.Node, *, written: bool) -> None:
    """`written`: the value of `node` goes to the output, so the sums at its top are left as they are."""
    for field, value in node.iter_fields():
        if isinstance(value, list):
            setattr(node, field, [_bound(item, node, field, written) for item in value])
        else:
            setattr(node, field, _bound(value, node, field, written))


def _bound(child: Any, parent: nodes.Node, field: str, written: bool) -> Any:
    if not isinstance(child, nodes.Node):
        return child
    keeps = isinstance(parent, nodes.Add | nodes.Concat) or (
        isinstance(parent, nodes.CondExpr) and field != "test"
    )
    goes_out = isinstance(parent, nodes.Output) or (written and keeps)
    _bound_below(child, written=goes_out)
    if goes_out or not isinstance(child, nodes.Add | nodes.Concat):
        return child
    if isinstance(child, nodes.Add):
        return _filter(_ADD, child.left, child.right)
    return _chain(child.nodes)


def _chain(parts: Sequence[nodes.Expr]) -> nodes.Expr:
    joined = parts[0]
    for part in parts[1:]:
        joined = _filter(_CONCAT, joined, part)
    return joined


def _filter(name: str, left: nodes.Expr, right: nodes.Expr) -> nodes.Filter:
    made = nodes.Filter(left, name, [right], [], None, None)
    made.set_lineno(left.lineno, override=False)
    return made
