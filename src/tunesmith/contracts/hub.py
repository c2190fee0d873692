"""Whether the Hugging Face hub can be reached, found out at once.

Its client tries each request six times, which takes 23 s of waiting where there is no network. Here one connection
is tried; where it fails, the client is put offline, as `HF_HUB_OFFLINE=1` does: what is in its cache still loads, and
the rest fails at once. The next that asks after a minute tries again, so a notebook is online again with its network.
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from urllib.parse import urlsplit
from urllib.request import getproxies

_SECONDS = 4.0
_KNOWN_FOR = 60.0


@dataclass
class _Known:
    """What the last connection showed, of which hub, and when."""

    endpoint: str = ""
    reachable: bool = True
    at: float = 0.0


_known = _Known()


def offline_if_unreachable() -> bool:
    """Put the hub's client offline where the hub cannot be reached, and back where it can; whether it is offline now.

    A client that was offline before, by the user's will, stays so and is not asked.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE and _known.reachable:
        return True
    now = time.monotonic()
    if _known.endpoint != constants.ENDPOINT or now - _known.at > _KNOWN_FOR:
        _known.endpoint, _known.reachable, _known.at = constants.ENDPOINT, _reachable(constants.ENDPOINT), now
        constants.HF_HUB_OFFLINE = not _known.reachable
    return bool(constants.HF_HUB_OFFLINE)


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
