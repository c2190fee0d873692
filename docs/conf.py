"""How `make docs` turns the Markdown of this repository into pages: Sphinx reads it with MyST, Furo lays it out.

The sources stay what they are on a code host. The navigation is the contents page, `docs/README.md`: each of its
lists becomes a part of it, so it stands in one place and not in a directive that only Sphinx understands.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONTENTS = "docs/README"
_VERSION = ROOT / "src" / "tunesmith" / "_version.py"

project = "Tunesmith"
version = re.findall(r'^__version__ = "(.+)"', _VERSION.read_text(encoding="utf-8"), flags=re.MULTILINE)[0]
release = version
extensions = ["myst_parser"]
root_doc = CONTENTS
# The sources are the repository, because pages link to files beside docs/; only these become pages.
include_patterns = [
    "docs/**",
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "benchmarks/RESULTS.md",
    "examples/data/README.md",
]
exclude_patterns = ["docs/conf.py"]
myst_heading_anchors = 4

html_theme = "furo"
html_title = f"Tunesmith {version}"
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False


def parts(contents: str) -> list[tuple[str, list[str]]]:
    """The lists of the contents page: the heading of each and the pages that it links to, as they stand there."""
    return [
        (
            section.partition("\n")[0].strip(),
            re.findall(r"^- \[.+?\]\((\S+?\.md)\)", section, flags=re.MULTILINE),
        )
        for section in contents.split("\n## ")[1:]
    ]


def navigation(contents: str) -> str:
    """The same as directives, which show nothing in the page and everything beside it."""
    return "\n".join(
        "\n".join(["```{toctree}", ":hidden:", f":caption: {title}", "", *pages, "```", ""])
        for title, pages in parts(contents)
    )


def _add_navigation(_app: Any, name: str, source: list[str]) -> None:
    if name == CONTENTS:
        source[0] += "\n" + navigation(source[0])


def _unlink_folders(app: Any, document: Any) -> None:
    """A link to a folder of the repository becomes its text: a site has no listing of it."""
    from sphinx.addnodes import pending_xref

    folder = (ROOT / app.env.docname).parent
    for link in list(document.findall(pending_xref)):
        if (folder / link["reftarget"]).is_dir():
            link.replace_self(link.children)


def _open_at_contents(app: Any, error: Exception | None) -> None:
    if error is None:
        refresh = f'<meta http-equiv="refresh" content="0; url={CONTENTS}.html">'
        page = f"<!doctype html>{refresh}<title>{project}</title>\n"
        (Path(app.outdir) / "index.html").write_text(page, encoding="utf-8")


def setup(app: Any) -> dict[str, bool]:
    """What Sphinx calls."""
    app.connect("source-read", _add_navigation)
    app.connect("doctree-read", _unlink_folders)
    app.connect("build-finished", _open_at_contents)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
