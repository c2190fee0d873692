"""Pages as a browser reads them, and texts that try to be more than text."""

from __future__ import annotations

from html.parser import HTMLParser

HOSTILE = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(2)'>",
    "</pre></body></html><!--",
    "&lt;b&gt; & &amp;",
    "]]><style>*{display:none}</style>",
    "\x1b[2J\x00\x07",
    "\u202eright to left",
]


class Page(HTMLParser):
    """A page as a browser reads it: its elements, their attributes, and its text by the element around it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def text(self, tag: str) -> str:
        return "".join(text for around, text in self.texts if around == tag)


def harmless(page: Page, elements: set[str]) -> None:
    """Nothing is loaded, nothing runs, and no element is there that the page does not make."""
    assert set(page.elements) <= elements
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href")]
    policy = next(value for name, value in page.attributes if name == "content" and "default-src" in value)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert "url(" not in page.text("style")
    assert "@import" not in page.text("style")
    assert page.open == []
