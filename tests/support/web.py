"""A web server of this machine for tests, in a thread: files with ETags and ranges, and all that goes wrong."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Site:
    """What the server has, and how it behaves; may be changed while it runs.

    Attributes:
        files: content by path.
        status: answers with this status in place of a file.
        redirects: where a path leads.
        ranges: serves byte ranges.
        tags: sends ETags.
        sizes: sends the length of what it sends.
        drop_after: bytes after which a connection is cut, once for each entry.
        login: the `Authorization` that is asked for.
        asked: (path with query, headers) of every request.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    status: int = 200
    redirects: dict[str, str] = field(default_factory=dict)
    ranges: bool = True
    tags: bool = True
    sizes: bool = True
    kind: str = "application/octet-stream"
    encoding: str | None = None
    drop_after: list[int] = field(default_factory=list)
    login: str | None = None
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    url: str = ""

    @property
    def bodies(self) -> list[str]:
        """The ranges of the requests that asked for more than the first byte."""
        spans = [headers.get("Range", "whole") for _, headers in self.asked]
        return [span for span in spans if span != "bytes=0-0"]


class _Handler(BaseHTTPRequestHandler):
    site: Site

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Serve one request as the site says."""
        site, path = self.site, self.path.partition("?")[0]
        site.asked.append((self.path, dict(self.headers)))
        if path in site.redirects:
            self._answer(302, {"Location": site.redirects[path]})
        elif site.status != 200:
            self._answer(site.status, {})
        elif site.login is not None and self.headers.get("Authorization") != site.login:
            self._answer(401, {})
        elif path not in site.files:
            self._answer(404, {})
        else:
            self._serve(site, site.files[path])

    def _answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _serve(self, site: Site, content: bytes) -> None:
        headers = {"Content-Type": site.kind}
        if site.encoding:
            headers["Content-Encoding"] = site.encoding
        if site.tags:
            headers["ETag"] = f'"{hashlib.md5(content).hexdigest()}"'
        span, status, part = self.headers.get("Range"), 200, content
        if span and site.ranges:
            first, _, last = span.removeprefix("bytes=").partition("-")
            part = content[int(first) : int(last) + 1 if last else None]
            status = 206 if part else 416
            end = int(first) + len(part) - 1
            headers["Content-Range"] = f"bytes {f'{first}-{end}' if part else '*'}/{len(content)}"
        if site.sizes:
            headers["Content-Length"] = str(len(part))
        if site.drop_after and span != "bytes=0-0":
            self._answer(status, headers, part[: site.drop_after.pop(0)])
            self.close_connection = True
        else:
            self._answer(status, headers, part)


@contextmanager
def serving(**behaviour: Any) -> Iterator[Site]:
    """A site that is served within the block; its `url` begins with http:// and ends without a slash."""
    site = Site(**behaviour)
    handler = type("Handler", (_Handler,), {"site": site})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
