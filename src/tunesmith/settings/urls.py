"""Addresses in a run file, and the form in which they may be shown.

A link may carry what opens it: a user and a password, or a signature in its query. Neither may stand in a log, in a
run directory or on a screen. No list can name every parameter that is a secret, so all values are hidden but those
of a few parameters that never are.
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit, urlunsplit

HIDDEN = "…"
"""What stands in the place of something that is not shown."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_URL_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"]+")
_HARMLESS = frozenset({"download", "raw", "dl", "ref", "revision", "version", "versionid", "format"})
_LONGEST = 64
"""A harmless value is no longer."""


def is_url(path: str) -> bool:
    """Whether a path is an address such as `https://host/rows.jsonl` and not a file."""
    return _URL.match(path) is not None


def shown(path: str) -> str:
    """`path` as it may be shown: an address without user, password, fragment and the values of its query."""
    if not is_url(path):
        return path
    try:
        split = urlsplit(path)
        _ = split.port  # of `https://user:pass/word@host` the password would be taken for a port and a path
    except ValueError:
        return f"{path.partition('://')[0]}://{HIDDEN}"
    scheme, network, place, query, _ = split
    host = network.rpartition("@")[2]
    named = "&".join(_shown_parameter(part) for part in query.split("&") if part)
    return urlunsplit((scheme, f"{HIDDEN}@{host}" if host != network else host, place, named, ""))


def _shown_parameter(part: str) -> str:
    name, equals, value = part.partition("=")
    if not equals:
        return HIDDEN
    return part if name.lower() in _HARMLESS and len(value) <= _LONGEST else f"{name}={HIDDEN}"


def shown_text(text: str) -> str:
    """A text with every address in it as it may be shown."""
    return _URL_IN_TEXT.sub(lambda match: shown(match.group()), text)
