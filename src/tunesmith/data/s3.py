"""Files in S3 and in what speaks its language, through fsspec and s3fs (the extra `s3`).

Credentials, region and endpoint are those of the environment and of the usual files (`AWS_PROFILE`, `~/.aws`,
`AWS_ENDPOINT_URL`, the role of a machine); none can stand in a run file.
"""

from __future__ import annotations

from typing import IO, Any, cast

from tunesmith.contracts.errors import DataError, UserError, first_line
from tunesmith.data.remote import DroppedError, UnreachableError, Version

_BLOCK = 8 << 20
"""Bytes that are asked for at once."""

_UNREACHABLE = (
    "EndpointConnectionError",
    "ConnectTimeoutError",
    "ClientConnectorError",
    "ProxyConnectionError",
)
_DROPPED = (
    "ReadTimeoutError", "ResponseStreamingError", "IncompleteReadError", "ConnectionClosedError",
    "ClientPayloadError", "ServerDisconnectedError", "ConnectionResetError", "FSTimeoutError",
)  # fmt: skip
_LOGIN = ("NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError", "ProfileNotFound")
"""Names of errors of botocore and of the client beneath, by what they mean; neither is imported for them."""


def file_system() -> Any:
    """fsspec's file system for s3.

    Raises:
        UserError: s3fs is not installed.
    """
    import fsspec

    try:
        return fsspec.filesystem("s3")
    except ImportError as error:
        raise UserError(
            "s3:// needs the package s3fs, which is not installed.", hint="Run `pip install 'tunesmith[s3]'`."
        ) from error


def match_pattern(url: str) -> list[str]:
    """The addresses of the files that a pattern such as `s3://bucket/rows-*.jsonl` matches, sorted.

    Raises:
        DataError: none does, or the bucket cannot be listed.
    """
    files = file_system()
    try:
        files.invalidate_cache()
        found = [
            f"s3://{path}" for path, info in files.glob(url, detail=True).items() if info["type"] == "file"
        ]
    except Exception as error:
        raise _meaning(error, url) or error from error
    if not found:
        raise DataError(
            f"No file matches the pattern {url}.", hint="Check the bucket, the folder and the suffix."
        )
    return sorted(found)


class S3File:
    """`remote.Remote` at an s3 address."""

    def __init__(self, url: str) -> None:
        self.label = self.identity = url
        self.name = url.rstrip("/").rpartition("/")[2]
        bucket, _, key = url.partition("://")[2].partition("/")
        if not bucket or not key or "?" in url or "@" in bucket:
            raise DataError(
                f"{url.partition('?')[0].rpartition('@')[2]} is not the address of a file in S3.",
                hint="Write s3://BUCKET/KEY.jsonl; credentials come from the environment or ~/.aws.",
            )

    def version(self) -> Version:
        """Size and tag, as the bucket has them now."""
        files = file_system()
        try:
            files.invalidate_cache()
            info = files.info(self.label)
        except Exception as error:
            raise self.explain(error) or error from None
        if info.get("type") == "directory":
            raise DataError(
                f"{self.label} is a folder.",
                hint=f"Write a pattern, such as {self.label.rstrip('/')}/*.jsonl.",
            )
        return Version(info["size"], _tag(info), ranges=True)

    def open(self, at: int, version: Version) -> IO[bytes]:
        """Its bytes from `at` on."""
        try:
            opened = file_system().open(self.label, "rb", block_size=_BLOCK, cache_type="readahead")
            opened.seek(at)
        except Exception as error:
            raise self.explain(error) or error from None
        details = getattr(opened, "details", None)
        if details and _tag(details) != version.tag:
            opened.close()
            raise DataError(
                f"{self.label} has changed while it was read.", hint="Start again, which reads the new one."
            )
        return cast(IO[bytes], opened)

    def explain(self, error: Exception) -> Exception | None:
        """What an error of the client means."""
        return _meaning(error, self.label)


def _tag(info: dict[str, Any]) -> str:
    return f"{info.get('ETag') or info.get('LastModified') or info.get('created')} {info['size']}"


def _meaning(error: Exception, label: str) -> Exception | None:
    """An error of the client as a sentence; None where it is not one of the network or the bucket."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    names = {type(each).__name__ for each in chain}
    if names & {*_LOGIN}:
        return DataError(
            f"{label} needs credentials, and none were found.",
            hint="Set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or write ~/.aws/credentials; "
            "for a public bucket set FSSPEC_S3_ANON=true.",
        )
    if names & {*_UNREACHABLE}:
        return UnreachableError(
            f"{label} cannot be reached.", hint="Check the network, the region and AWS_ENDPOINT_URL."
        )
    if names & {*_DROPPED}:
        return DroppedError(type(error).__name__)
    if isinstance(error, UserError):
        return error
    if isinstance(error, FileNotFoundError):
        return DataError(f"There is no file {label}.", hint="Check the bucket and the key.")
    if isinstance(error, PermissionError):
        return DataError(
            f"{label} may not be read with the credentials of this machine.",
            hint="Check AWS_PROFILE, or the rights of its user on the bucket.",
        )
    if isinstance(error, OSError | ValueError) or type(error).__module__.startswith("botocore"):
        return DataError(f"{label} cannot be read: {first_line(error)}.")
    return None
