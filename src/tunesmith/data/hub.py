"""Rows of a data set on the Hugging Face hub, and its failures in one sentence each.

`datasets` owns downloading, caching and building. Ours is to say in plain words what went wrong: its own
errors span several exception types for one cause and one type for several causes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import count
from typing import Any

from tunesmith.contracts.errors import DataError, first_line
from tunesmith.contracts.hub import offline_if_unreachable
from tunesmith.data.columnar import without_nulls
from tunesmith.data.found import Found

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

_CAUSES: tuple[tuple[str, str, str], ...] = (
    (
        r"gated|awaiting a review|must be authenticated|401|403",
        "is gated or private",
        "Ask for access on its page, then log in with `hf auth login`.",
    ),
    (
        r"offline|couldn't reach|connection|connect|timed? ?out|resolve host|max retries",
        "could not be reached",
        "Check the network and HF_HUB_OFFLINE, or download the data and name the local path.",
    ),
    (
        r"config name is missing|builderconfig|pick one among",
        "has several configurations",
        "Name one of them with `name`.",
    ),
    (r"unknown split|bad split|unrecognized instruction", "has no such split", "Mend `split`."),
    (
        r"scripts are no longer supported|trust_remote_code",
        "needs a loading script, which is not run",
        "Look for a Parquet version of it (often the revision `refs/convert/parquet`).",
    ),
    (r"revision|refs/", "has no such revision", "Mend `revision`."),
    (
        r"doesn't exist|not found|cannot be accessed|404",
        "was not found",
        "Check the spelling; if the data set is private or gated, log in with `hf auth login`.",
    ),
)
"""Pattern over `ErrorType: message`, what to say, and what to do; the first that matches wins."""


def looks_like_hub_name(path: str) -> bool:
    """Whether `path` has the form `name` or `org/name`."""
    return _NAME.fullmatch(path) is not None


def explain_failure(path: str, error: BaseException) -> DataError:
    """What `datasets` raised for the data set `path`, as one sentence and a hint."""
    text = f"{type(error).__name__}: {error}"
    for pattern, sentence, hint in _CAUSES:
        if re.search(pattern, text, flags=re.IGNORECASE):
            detail = "" if sentence.startswith(("is gated", "could not")) else f" ({first_line(error)})"
            return DataError(f"The Hugging Face data set {path!r} {sentence}{detail}.", hint=hint)
    return DataError(f"The Hugging Face data set {path!r} cannot be loaded: {first_line(error)}.")


class HubRows:
    """A hub data set that is loaded when its rows or its fingerprint are first asked for.

    With `streaming` it is not downloaded first: rows come over the network as they are asked for.
    """

    def __init__(
        self, path: str, *, split: str, name: str | None, revision: str | None, streaming: bool = False
    ) -> None:
        self._path = path
        self._arguments: dict[str, Any] = {"split": split, "name": name, "revision": revision}
        if streaming:
            self._arguments["streaming"] = True
        self._loaded: Any = None

    def _load(self) -> Any:
        if self._loaded is None:
            import datasets

            if offline_if_unreachable():
                datasets.config.HF_HUB_OFFLINE = True
            try:
                self._loaded = datasets.load_dataset(self._path, **self._arguments)
            except Exception as error:
                # Everything: the types come from the HTTP client beneath, which has been another one with
                # every major version, and nothing of ours runs inside.
                raise explain_failure(self._path, error) from error
        return self._loaded

    def rows(self, start: int = 0) -> Iterator[Found]:
        """The rows from `start` on; the place is `org/name:row N`, from 0.

        Raises:
            DataError: where the data set cannot be found, reached or built.
        """
        loaded = self._load()
        records = iter(loaded.skip(start) if start else loaded)
        for number in count(start):
            try:
                record = next(records)
            except StopIteration:
                return
            except Exception as error:  # as in `_load`: a stream is downloaded while it is read
                raise explain_failure(self._path, error) from error
            yield Found(f"{self._path}:row {number}", without_nulls(dict(record)))

    def fingerprint(self) -> str:
        """The fingerprint that `datasets` keeps of the data set and of everything done to it."""
        return str(self._load()._fingerprint)
