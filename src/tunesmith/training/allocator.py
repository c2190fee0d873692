"""How torch's allocator takes memory from CUDA's driver. Torch-free: it has to be said before torch takes any."""

from __future__ import annotations

import os
import platform
from collections.abc import MutableMapping

_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def grow_segments(
    environment: MutableMapping[str, str] = os.environ, release: str | None = None
) -> MutableMapping[str, str]:
    """Let segments of device memory grow where they are, in place of further ones of a fixed size.

    Layers of a long row take buffers of a dozen large sizes in turn; in fixed segments the gaps between them came to
    a third of what was in use. Left alone: an environment that says something of the allocator, and Linux within
    Windows, some of whose drivers fail at mapping memory so.

    Args:
        environment: of the process, changed in place.
        release: of the kernel; this machine's without it.

    Returns:
        The environment.
    """
    release = platform.release() if release is None else release
    if "microsoft" not in release.lower() and not any(name in environment for name in _NAMES):
        environment[_NAMES[0]] = "expandable_segments:True"
    return environment
