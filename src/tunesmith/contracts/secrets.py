"""Text without what logs in somewhere: for everything that leaves the machine or stays in a log. Torch-free."""

from __future__ import annotations

import os
import re
from urllib.parse import urlsplit, urlunsplit

HIDDEN = "(not shown)"
"""What stands where a secret stood."""

_NAME = re.compile(
    r"(^|_)(token|secret|password|passwd|key|credentials?|authorization|auth)$", flags=re.IGNORECASE
)
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")
_ADDRESS = re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s'\"]+", flags=re.IGNORECASE)


def names_a_secret(name: str) -> bool:
    """Whether a setting of this name holds a secret: `hub_token` does, `new_tokens` does not."""
    return _NAME.search(name) is not None


def without_secrets(text: str) -> str:
    """The text without tokens of the hub, and its addresses without user, password and query."""
    token = os.environ.get("HF_TOKEN")
    if token:
        text = text.replace(token, HIDDEN)
    return _HUB_TOKEN.sub(HIDDEN, _ADDRESS.sub(lambda match: _bare(match[0]), text))


def _bare(address: str) -> str:
    try:
        parts = urlsplit(address)
    except ValueError:  # no address that one could take apart
        return HIDDEN
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))
