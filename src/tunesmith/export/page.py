"""An HTML page of one file, and the parts that reports are made of: names and values, tiles, bars, texts with marks.

Everything is inside the page: no script, no font, no file of its own, and a policy in its head forbids to load or run
anything. Text goes through `escape`, whatever it is. Rejected: a template engine with a theme. The pages are short,
and what is escaped by hand in one place can be seen there.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files

from tunesmith.contracts.visible import visible


def escape(text: object) -> str:
    """Text as HTML that shows it: no tag, no attribute, no control character."""
    return html.escape(visible(str(text)).encode("utf-8", "replace").decode(), quote=True)


def page(title: str, parts: Iterable[str], styles: Sequence[str] = ()) -> str:
    """A whole page.

    Args:
        title: what a browser writes on the tab.
        parts: the body, as HTML; empty parts are left out.
        styles: names of style sheets of this package that this page needs besides.
    """
    sheets = [
        (files("tunesmith.export") / name).read_text(encoding="utf-8") for name in ("page.css", *styles)
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{''.join(sheets)}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def names_and_values(entries: Mapping[str, object]) -> str:
    """Names with a value each."""
    if not entries:
        return ""
    lines = (f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in entries.items())
    return f"<dl>{''.join(lines)}</dl>"


def tiles(values: Mapping[str, object]) -> str:
    """The figures that matter most, large, each above its name."""
    lines = (f"<div><b>{escape(value)}</b>{escape(name)}</div>" for name, value in values.items())
    return f'<div class="tiles">{"".join(lines)}</div>'


def legend(*entries: tuple[str, str]) -> str:
    """What colours stand for: (class, word) of each."""
    boxes = "".join(f'<i class="{kind}"></i>{escape(word)}' for kind, word in entries)
    return f'<p class="legend faint">{boxes}</p>'


def bars(rows: Sequence[tuple[str, Sequence[tuple[str, float]], str]]) -> str:
    """Named bars of one scale, each in parts.

    Args:
        rows: name; (class, value) of each part; what is written behind the bar.
    """
    most = max((sum(value for _, value in parts) for _, parts, _ in rows), default=0)
    lines = []
    for name, parts, said in rows:
        boxes = "".join(
            f'<i class="{kind}" style="width:{value / most * 100:.3f}%"></i>'
            for kind, value in parts
            if value
        )
        cells = (("name", escape(name)), ("bar", boxes), ("said", escape(said)))
        lines.append("".join(f'<div class="{kind}">{content}</div>' for kind, content in cells))
    return f'<div class="bars">{"".join(lines)}</div>'


def marked(pieces: Iterable[tuple[bool, str]]) -> str:
    """A text in pieces, of which those with True are marked."""
    text = "".join(f"<mark>{escape(piece)}</mark>" if mark else escape(piece) for mark, piece in pieces)
    return f"<pre>{text}</pre>"
