"""Text without what logs in somewhere: for everything that leaves the machine or stays in a log. Torch-free."""

from __future__ import annotations

import os
import re

from tunesmith.settings.urls import shown_text

HIDDEN = "(not shown)"
"""What stands where a secret stood."""

_NAME = re.compile(
    r"(^|_)(token|secret|password|passwd|key|credentials?|authorization|auth)$", flags=re.IGNORECASE
)
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")


def names_a_secret(name: str) -> bool:
    """Whether a setting of this name holds a secret: `hub_token` does, `new_tokens` does not."""
    return _NAME.search(name) is not None


def without_secrets(text: str) -> str:
    """The text without tokens of the hub, and with its addresses as they may be shown."""
    text = shown_text(text)  # first: a token in an address would become words that end the address
    token = os.environ.get("HF_TOKEN")
    if token:
        text = text.replace(token, HIDDEN)
    return _HUB_TOKEN.sub(HIDDEN, text)
