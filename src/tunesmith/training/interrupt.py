"""Ctrl-C and SIGTERM ask for a clean end: the step is finished, a checkpoint written, the exit code is 0.

A step may take minutes, so the first Ctrl-C is answered at once; a second one ends at once.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType


class StopRequest:
    """Context manager; inside it `requested` turns True on the first SIGINT or SIGTERM.

    Outside the main thread, where Python cannot install handlers, it never does.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal returned

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.requested and number == signal.SIGINT:
            # past Python's own buffers, which the handler may have interrupted
            os.write(2, b"\nstopping after this step; Ctrl-C once more ends at once\n")
        self.requested = True
