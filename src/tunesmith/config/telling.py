"""Lines about downloads, on a console beside a spinner."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.status import Status
from rich.text import Text

if TYPE_CHECKING:
    from tunesmith.data.remote import Tell


def teller(console: Console, status: Status) -> Tell:
    """What prints lines that stay, and shows those that are replaced behind the spinner."""

    def tell(text: str, lasting: bool) -> None:
        if lasting:
            console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)
        else:
            status.update(Text(text))

    return tell
