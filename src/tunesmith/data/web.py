"""Files on the web: https with the standard library, and its failures in one sentence each.

Proxies and certificates are those of the environment (`HTTPS_PROXY`, `SSL_CERT_FILE`), a user and a password come
from the address or from `~/.netrc`, and go to that host only. Encryption is asked of every host but this machine:
whoever sits in between could put rows of his own into a data set that comes over plain http.
"""

from __future__ import annotations

import base64
import email.message
import http.client
import netrc
import re
import socket
import ssl
from typing import IO, Any, cast
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlsplit, urlunsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from tunesmith.contracts.errors import DataError, first_line
from tunesmith.data.remote import DroppedError, UnreachableError, Version
from tunesmith.settings.urls import HIDDEN, shown

_SECONDS = 20.0
_SIGNING = re.compile(
    r"x-(amz|goog)-.*|signature|sig|se|sp|st|sv|sr|skoid|sktid|ske|sks|skt|skv|expires|policy|key-pair-id"
    r"|awsaccesskeyid|googleaccessid|(access_)?token|api_?key",
    re.IGNORECASE,
)
"""Parameters that open a file and do not choose it: links that differ in them lead to the same file."""

_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
_BUSY = (408, 425, 429, 500, 502, 503, 504)


class WebFile:
    """`remote.Remote` at an https address.

    Args:
        url: the address, with what opens it.

    Raises:
        DataError: it is not an address that may be read.
    """

    def __init__(self, url: str) -> None:
        self.label = shown(url)
        try:
            split = urlsplit(url)
            port = f":{split.port}" if split.port else ""
        except ValueError:
            raise _not_an_address(self.label) from None
        host = split.hostname or ""
        if not host or not split.path.strip("/"):
            raise _not_an_address(self.label)
        if HIDDEN in split.query:
            raise DataError(
                f"The address {self.label} has lost its query: it was hidden when it was written down.",
                hint="Use the run file with the whole address, or a fresh link.",
            )
        _check_encrypted(split.scheme.lower(), host, self.label)
        network = f"[{host}]{port}" if ":" in host else host + port
        path = quote(unquote(split.path), safe="/:@!$&'()*+,;=~-._")
        path = split.path if "%" in split.path else path  # what is quoted already is taken as it stands
        query = quote(split.query, safe="/:@!$&'()*+,;=~-._%?")
        self._url = urlunsplit((split.scheme, network, path, query, ""))
        self._login = _login(split.username, split.password, host)
        self.name = unquote(split.path.rstrip("/").rpartition("/")[2])
        chosen = sorted(part for part in query.split("&") if not _SIGNING.fullmatch(part.partition("=")[0]))
        self.identity = urlunsplit((split.scheme, network, path, "&".join(chosen), ""))

    def version(self) -> Version:
        """Size and tag, from the answer to a question for the first byte: a signed link is often for GET alone."""
        with self._get("bytes=0-0") as answer:
            headers = answer.headers
            self._check_kind(headers)
            ranges = answer.status in (206, 416)
            length = (
                headers.get("Content-Range", "").rpartition("/")[2]
                if ranges
                else headers.get("Content-Length")
            )
            size = int(length) if length and length.isdecimal() else None
        return Version(size, _tag(headers, size), ranges)

    def open(self, at: int, version: Version) -> IO[bytes]:
        """The body of an answer that begins at byte `at`, or is read up to it where the server has no ranges."""
        answer = self._get(f"bytes={at}-" if at and version.ranges else None)
        if version.tag and _tag(answer.headers, version.size) != version.tag:
            answer.close()
            raise DataError(
                f"{self.label} has changed while it was read.", hint="Start again, which reads the new one."
            )
        if at and answer.status != 206:
            _skip(answer, at)
        return cast(IO[bytes], answer)

    def _get(self, span: str | None) -> http.client.HTTPResponse:
        request = Request(self._url, headers={"Accept-Encoding": "identity", "User-Agent": "tunesmith"})
        if span is not None:
            request.add_header("Range", span)
        if self._login is not None:
            request.add_unredirected_header("Authorization", self._login)
        try:
            return cast(http.client.HTTPResponse, build_opener(_Redirects).open(request, timeout=_SECONDS))
        except HTTPError as error:
            if error.code == 416 and span == "bytes=0-0":  # of an empty file there is no first byte
                return cast(http.client.HTTPResponse, error)
            error.close()
            raise self._refused(error.code, error.reason) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            meaning = self.explain(error)
            if meaning is None:
                raise
            raise meaning from None  # what is in the chain may name the address in full

    def explain(self, error: Exception) -> Exception | None:
        """What an error of the client means."""
        reason = (
            error.reason if isinstance(error, URLError) and isinstance(error.reason, Exception) else error
        )
        host = urlsplit(self._url).hostname
        match reason:
            case DataError():
                return reason
            case ssl.SSLCertVerificationError():
                return DataError(
                    f"The certificate of {host} cannot be verified: {reason.verify_message}.",
                    hint="Set SSL_CERT_FILE to the certificates of your organisation, if it has its own.",
                )
            case socket.gaierror():
                return _unreachable(self.label, f"the host {host} is not known, or there is no network")
            case ConnectionRefusedError():
                return _unreachable(self.label, f"{host} refuses the connection")
            case TimeoutError():
                return _unreachable(self.label, f"{host} does not answer")
            case ConnectionError() | http.client.RemoteDisconnected() | ssl.SSLError():
                return DroppedError(first_line(reason))
            case http.client.InvalidURL() | ValueError():
                return _not_an_address(self.label)
            case http.client.HTTPException():
                return DroppedError(type(reason).__name__)
            case OSError():
                return _unreachable(self.label, reason.strerror or first_line(reason))
        return None

    def _refused(self, code: int, reason: str) -> Exception:
        said = f"{code} {reason}".strip()
        if code in _BUSY:
            return DroppedError(f"the server answers {said}")
        if code in (401, 403, 407):
            return DataError(
                f"{self.label} may not be read: the server answers {said}.",
                hint="A signed link may have expired; a user and a password go into ~/.netrc.",
            )
        if code in (404, 410):
            return DataError(
                f"There is no file {self.label}: the server answers {said}.", hint="Check the address."
            )
        return DataError(
            f"{self.label} cannot be read: the server answers {said}.", hint="Check the address."
        )

    def _check_kind(self, headers: email.message.Message) -> None:
        """Refuse a page about the file in place of the file, and bytes that are not those of the file."""
        if headers.get_content_type() == "text/html":
            raise DataError(
                f"{self.label} is a web page and not a file of rows.",
                hint="Use the link of the download itself (on a code host often called raw).",
            )
        if headers.get("Content-Encoding", "identity") != "identity" and not self.name.lower().endswith(
            ".gz"
        ):
            raise DataError(
                f"{self.label} is sent compressed ({headers['Content-Encoding']}), although that was not asked for.",
                hint="Download it and name the local file.",
            )


class _Redirects(HTTPRedirectHandler):
    """Follows redirects to hosts that may be read; what logs in goes to the first host alone."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> Request | None:
        """The request for the new address."""
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        _check_encrypted(new.scheme.lower(), new.hostname or "", shown(newurl))
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        login = req.unredirected_hdrs.get("Authorization")
        if request is not None and login and old[:2] == new[:2]:
            request.add_unredirected_header("Authorization", login)
        return request


def _check_encrypted(scheme: str, host: str, label: str) -> None:
    if scheme != "https" and not (scheme == "http" and host in _THIS_MACHINE):
        raise DataError(
            f"{label} is not encrypted, so whoever is in between could change its rows.",
            hint="Use https, or download it in a way that you trust and name the local file.",
        )


def _login(user: str | None, password: str | None, host: str) -> str | None:
    """The `Authorization` of a user, from the address or from `~/.netrc`."""
    if user is None:
        try:
            found = netrc.netrc().authenticators(host)
        except (OSError, netrc.NetrcParseError):
            return None
        if found is None:
            return None
        text = f"{found[0]}:{found[2]}"
    else:
        text = f"{unquote(user)}:{unquote(password or '')}"
    return "Basic " + base64.b64encode(text.encode()).decode()


def _tag(headers: email.message.Message, size: int | None) -> str:
    tag = headers.get("ETag") or headers.get("Last-Modified")
    return f"{tag} {size}" if tag else ""


def _skip(answer: http.client.HTTPResponse, count: int) -> None:
    while count:
        got = len(answer.read(min(count, 1 << 20)))
        if not got:
            raise DroppedError("it ended early")
        count -= got


def _unreachable(label: str, reason: str) -> UnreachableError:
    return UnreachableError(
        f"{label} cannot be reached: {reason}.",
        hint="Check the network and the address, or name a local file.",
    )


def _not_an_address(label: str) -> DataError:
    return DataError(f"{label} is not the address of a file.", hint="Write https://HOST/PATH.jsonl.")
