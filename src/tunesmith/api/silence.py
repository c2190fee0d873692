"""What libraries print while a script loads a model, and nobody asked for; import it before them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


def _is_other_advice(record: logging.LogRecord) -> bool:
    return "gemm_4bit_forward" not in str(record.msg)


# Where it is first imported, by whatever library, bitsandbytes advises a faster kernel for CPUs. That kernel rounds
# the scales of 4-bit weights for good and is switched off, see `models.loader`.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_other_advice)


@contextmanager
def without_bars(quiet: bool) -> Iterator[None]:
    """Within the block transformers draws no progress bars, if that is wanted."""
    from transformers.utils import logging as bars

    drawn = quiet and bars.is_progress_bar_enabled()
    if drawn:
        bars.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            bars.enable_progress_bar()
