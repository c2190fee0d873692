"""Whether the Hugging Face hub can be reached, found out once and at once.

Its client tries each request six times, which takes 23 s of waiting where there is no network. Here one connection
is tried; where it fails, the client is put offline for this process, as `HF_HUB_OFFLINE=1` does: what is in its cache
still loads, and the rest fails at once.
"""

from __future__ import annotations

import functools
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

_SECONDS = 4.0


def offline_if_unreachable() -> bool:
    """Put the hub's client offline where the hub cannot be reached; whether it is offline now."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE and not _reachable(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = True
    return bool(constants.HF_HUB_OFFLINE)


@functools.cache
def _reachable(endpoint: str) -> bool:
    """Whether a connection can be made. Behind a proxy that cannot be told, and counts as yes."""
    address = urlsplit(endpoint)
    if {"all", address.scheme} & getproxies().keys():
        return True
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        with socket.create_connection((address.hostname or "", port), timeout=_SECONDS):
            return True
    except OSError:
        return False
