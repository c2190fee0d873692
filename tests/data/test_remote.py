"""Sources at addresses: copied once, noticed when they change, resumed, streamed, explained, never shown whole."""

from __future__ import annotations

import base64
import errno
import gzip
import io
import itertools
import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.support.web import Site, serving
from tunesmith.contracts.errors import DataError, StorageError, UserError
from tunesmith.data import fetch, remote
from tunesmith.data.cache import cache_folder
from tunesmith.data.sources import Source, open_source

ROWS = [{"text": f"row number {n} of the file"} for n in range(3000)]
CONTENT = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WAITS", (0.0, 0.0))
    monkeypatch.setattr(fetch, "_BLOCK", 4096)
    monkeypatch.setenv("HOME", "/nowhere")  # no ~/.netrc of a developer
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def site() -> Iterator[Site]:
    with serving(files={"/a/rows.jsonl": CONTENT}) as found:
        yield found


def records(source: Source) -> list[Any]:
    return [row.record for row in source.rows()]


def read(url: str, **options: Any) -> list[Any]:
    return records(open_source(url, **options))


def copies() -> list[Path]:
    return sorted(cache_folder("remote").glob("*/data*"))


# ---------------------------------------------------------------- copies


def test_rows_come_over_the_web_with_their_place_and_are_copied_once(site: Site) -> None:
    source = open_source(f"{site.url}/a/rows.jsonl")
    assert not site.asked, "nothing is asked before rows are"
    rows = list(source.rows())
    assert [row.record for row in rows] == ROWS
    assert rows[4].where == f"{site.url}/a/rows.jsonl:5"
    assert source.is_local
    assert read(f"{site.url}/a/rows.jsonl", split="train[:2]") == ROWS[:2]
    assert site.bodies == ["whole"]
    assert [path.read_bytes() for path in copies()] == [CONTENT]


def test_the_fingerprint_is_that_of_the_bytes(site: Site, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(CONTENT)
    there, here = open_source(f"{site.url}/a/rows.jsonl"), open_source(tmp_path / "rows.jsonl")
    assert there.fingerprint() == here.fingerprint()


@pytest.mark.parametrize("tags", [True, False])
def test_a_changed_file_is_copied_again_and_the_old_copy_goes(site: Site, tags: bool) -> None:
    """Without tags the size tells."""
    site.tags = tags
    assert read(f"{site.url}/a/rows.jsonl") == ROWS
    site.files["/a/rows.jsonl"] = b'{"text": "new"}\n'
    assert read(f"{site.url}/a/rows.jsonl") == [{"text": "new"}]
    assert [path.read_bytes() for path in copies()] == [b'{"text": "new"}\n']


def test_a_file_of_which_nothing_is_told_is_copied_each_time(site: Site) -> None:
    site.tags = site.sizes = site.ranges = False
    for text in (b'{"text": "a"}\n', b'{"text": "b"}\n'):
        site.files["/a/rows.jsonl"] = text
        assert read(f"{site.url}/a/rows.jsonl") == [json.loads(text)]
    assert len(copies()) == 1


def test_a_damaged_copy_is_copied_again(site: Site) -> None:
    read(f"{site.url}/a/rows.jsonl")
    copies()[0].write_bytes(CONTENT[:100])
    assert read(f"{site.url}/a/rows.jsonl") == ROWS


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.txt", "rows.parquet", "rows.csv"])
def test_every_kind_of_file(site: Site, name: str) -> None:
    texts = [{"text": f"line {n}"} for n in range(10)]
    site.files["/" + name] = content_of(name, texts)
    assert read(f"{site.url}/{name}") == texts
    assert read(f"{site.url}/{name}", streaming=True) == texts


def content_of(name: str, texts: list[dict[str, str]]) -> bytes:
    if name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(texts), buffer)
        return buffer.getvalue()
    if name.endswith(".gz"):
        return gzip.compress("".join(json.dumps(row) + "\n" for row in texts).encode())
    lines = [row["text"] + "\n" for row in texts]
    return "".join(["text\n", *lines] if name.endswith(".csv") else lines).encode()


def test_an_empty_file_holds_no_rows(site: Site) -> None:
    site.files["/a/rows.jsonl"] = b""
    with pytest.raises(DataError, match="holds no rows"):
        read(f"{site.url}/a/rows.jsonl")


# ---------------------------------------------------------------- transfers that break


def test_a_lost_connection_goes_on_where_it_ended(site: Site) -> None:
    site.drop_after = [10_000, 20_000]
    assert read(f"{site.url}/a/rows.jsonl") == ROWS
    assert site.bodies == ["whole", "bytes=10000-", "bytes=30000-"]


def test_a_server_without_ranges_is_read_again_from_the_beginning(site: Site) -> None:
    site.ranges = False
    site.drop_after = [10_000]
    assert read(f"{site.url}/a/rows.jsonl") == ROWS


def test_a_transfer_that_is_given_up_goes_on_in_the_next_run(site: Site) -> None:
    site.drop_after = [50_000, 0, 0, 0]
    with pytest.raises(DataError, match="was lost again and again") as caught:
        read(f"{site.url}/a/rows.jsonl")
    assert "what has been downloaded is kept" in (caught.value.hint or "")
    assert not copies()
    told: list[str] = []
    source = open_source(f"{site.url}/a/rows.jsonl", tell=lambda text, lasting: told.append(text))
    assert records(source) == ROWS
    assert site.bodies[-1] == "bytes=50000-"
    assert "going on at 50.0 kB" in told[0]
    assert not list(cache_folder("remote").glob(".part-*"))


def test_what_is_left_of_another_version_is_not_gone_on_with(site: Site) -> None:
    site.drop_after = [50_000, 0, 0, 0]
    with pytest.raises(DataError, match="again and again"):
        read(f"{site.url}/a/rows.jsonl")
    site.files["/a/rows.jsonl"] = CONTENT[::-1][1:] + b"\n"
    source = open_source(f"{site.url}/a/rows.jsonl")
    source.fingerprint()
    assert copies()[0].read_bytes() == CONTENT[::-1][1:] + b"\n"


def test_a_file_that_changes_while_it_is_read_is_not_mixed(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.drop_after = [10_000]
    monkeypatch.setattr(remote.time, "sleep", lambda _: site.files.update({"/a/rows.jsonl": CONTENT * 2}))
    with pytest.raises(DataError, match="has changed while it was read"):
        read(f"{site.url}/a/rows.jsonl")


def test_a_busy_server_is_asked_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.status = 503
    monkeypatch.setattr(remote.time, "sleep", lambda _: setattr(site, "status", 200))
    assert read(f"{site.url}/a/rows.jsonl") == ROWS
    assert [path for path, _ in site.asked][:2] == ["/a/rows.jsonl"] * 2


def test_a_file_that_does_not_fit_is_refused_before(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=len(CONTENT) + (256 << 20) - 1)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        StorageError, match=r"has 119 kB, and the disk of the cache .* has 269 MB free"
    ) as caught:
        read(f"{site.url}/a/rows.jsonl")
    assert "data.streaming" in (caught.value.hint or "")
    assert not site.bodies


def test_a_disk_that_fills_up_is_said_and_what_came_is_kept(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = fetch._blocks

    def filling(*arguments: Any) -> Iterator[bytes]:
        yield from itertools.islice(blocks(*arguments), 3)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(fetch, "_blocks", filling)
        with pytest.raises(StorageError, match=r"The disk of the cache .*remote is full") as caught:
            read(f"{site.url}/a/rows.jsonl")
    assert "TUNESMITH_CACHE" in (caught.value.hint or "")
    assert read(f"{site.url}/a/rows.jsonl") == ROWS
    assert site.bodies[-1] == f"bytes={3 * 4096}-"


def test_progress_is_told(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_TELL_EVERY", 0.0)
    told: list[tuple[str, bool]] = []
    read(f"{site.url}/a/rows.jsonl", tell=lambda *line: told.append(line))
    assert told[0] == (f"downloading {site.url}/a/rows.jsonl (119 kB)", True)
    assert told[1] == (f"downloading {site.url}/a/rows.jsonl: 4.1 kB of 119 kB", False)
    assert not any(lasting for _, lasting in told[1:])
    told.clear()
    read(f"{site.url}/a/rows.jsonl", tell=lambda *line: told.append(line))
    assert not told


# ---------------------------------------------------------------- no network


def test_without_a_network_the_copy_is_used_and_said() -> None:
    with serving(files={"/rows.jsonl": CONTENT}) as gone:
        url = f"{gone.url}/rows.jsonl"
        assert read(url) == ROWS
    told: list[tuple[str, bool]] = []
    assert read(url, tell=lambda *line: told.append(line)) == ROWS
    ((text, lasting),) = told
    assert lasting
    assert text.startswith(f"note: {url} cannot be reached: 127.0.0.1 refuses the connection. The copy of 20")


def test_without_a_network_and_without_a_copy_it_is_an_error() -> None:
    with serving() as gone:
        url = f"{gone.url}/rows.jsonl"
    with pytest.raises(DataError, match=r"cannot be reached: 127\.0\.0\.1 refuses the connection"):
        read(url)
    with pytest.raises(DataError, match="cannot be reached"):
        read(url, streaming=True)


# ---------------------------------------------------------------- streams


def test_a_stream_is_read_without_a_copy(site: Site) -> None:
    source = open_source(f"{site.url}/a/rows.jsonl", streaming=True)
    stamp = source.stamp()
    assert site.bodies == [], "the stamp reads no file"
    assert records(source) == ROWS
    assert [row.index for row in source.rows(2998)] == [2998, 2999]
    assert not source.is_local
    assert not copies()
    site.files["/a/rows.jsonl"] = CONTENT[:-1]
    assert open_source(f"{site.url}/a/rows.jsonl", streaming=True).stamp() != stamp


def test_a_stream_goes_on_after_a_lost_connection(site: Site) -> None:
    site.drop_after = [10_001]
    assert read(f"{site.url}/a/rows.jsonl", streaming=True) == ROWS
    assert site.bodies == ["whole", "bytes=10001-"]


def test_parquet_of_a_server_without_ranges_is_copied(site: Site) -> None:
    texts = [{"text": "one"}]
    site.files["/rows.parquet"] = content_of("rows.parquet", texts)
    site.ranges = False
    assert read(f"{site.url}/rows.parquet", streaming=True) == texts
    assert len(copies()) == 1


def test_arrow_is_copied_also_for_a_stream(site: Site) -> None:
    import pyarrow

    buffer, table = io.BytesIO(), pyarrow.Table.from_pylist([{"text": "one"}])
    with pyarrow.ipc.new_stream(buffer, table.schema) as writer:
        writer.write_table(table)
    site.files["/rows.arrow"] = buffer.getvalue()
    assert read(f"{site.url}/rows.arrow", streaming=True) == [{"text": "one"}]
    assert len(copies()) == 1


# ---------------------------------------------------------------- what opens it, and redirects


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


def test_a_user_in_the_address_logs_in_and_is_not_shown(site: Site) -> None:
    site.login = basic("me@home:pass/word")
    url = site.url.replace("http://", "http://me%40home:pass%2Fword@") + "/a/rows.jsonl"
    source = open_source(url)
    assert records(source) == ROWS
    assert source.label == site.url.replace("http://", "http://…@") + "/a/rows.jsonl"


def test_a_user_of_netrc_logs_in(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password 100%41\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    site.login = basic("me:100%41")
    assert read(f"{site.url}/a/rows.jsonl") == ROWS


def test_redirects_are_followed_and_another_host_gets_no_login(site: Site) -> None:
    with serving(files={"/there.jsonl": CONTENT}) as other:
        site.redirects = {"/x.jsonl": f"{other.url}/there.jsonl", "/y.jsonl": f"{site.url}/a/rows.jsonl"}
        site.login = basic("me:word")
        mine = site.url.replace("http://", "http://me:word@")
        assert read(f"{mine}/x.jsonl") == ROWS
        assert read(f"{mine}/y.jsonl") == ROWS
        assert not any("Authorization" in headers for _, headers in other.asked)


def test_a_redirect_to_a_host_without_encryption_is_refused(site: Site) -> None:
    site.redirects = {"/x.jsonl": "http://example.org/rows.jsonl?token=abc"}
    with pytest.raises(DataError, match=r"http://example\.org/rows\.jsonl\?token=… is not encrypted"):
        read(f"{site.url}/x.jsonl")


def test_two_signatures_lead_to_one_copy_and_two_choices_to_two(site: Site) -> None:
    for query in ("X-Amz-Signature=1&X-Amz-Date=5", "X-Amz-Signature=2&X-Amz-Date=6", "sig=3"):
        assert read(f"{site.url}/a/rows.jsonl?{query}") == ROWS
    assert len(site.bodies) == 1
    assert site.asked[-1][0].endswith("?sig=3")
    read(f"{site.url}/a/rows.jsonl?part=1")
    read(f"{site.url}/a/rows.jsonl?part=2")
    assert len(copies()) == 3


SECRET = "s3cr3t"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "failure", [{}, {"status": 403}, {"status": 404}, {"status": 500}, {"kind": "text/html"}]
)
def test_no_secret_is_in_a_label_a_place_a_message_or_the_cache(
    site: Site, failure: dict[str, Any], streaming: bool
) -> None:
    for name, value in failure.items():
        setattr(site, name, value)
    url = (
        site.url.replace("http://", f"http://me:{SECRET}@")
        + f"/a/rows.jsonl?token={SECRET}&x-amz-signature={SECRET}"
    )
    told: list[str] = []
    source = open_source(url, streaming=streaming, tell=lambda text, lasting: told.append(text))
    seen = [source.label, source.selection]
    if failure:
        with pytest.raises(DataError) as caught:
            records(source)
        seen += [str(caught.value), str(caught.value.__cause__)]
    else:
        seen += [next(source.rows()).where, source.stamp(), *told]
    names = [str(path) for path in cache_folder("remote").rglob("*")]
    notes = [path.read_text() for path in cache_folder("remote").rglob("*.json")]
    assert SECRET not in "\n".join([*seen, *names, *notes])


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("behaviour", "message", "hint"),
    [
        (
            {"status": 404},
            "There is no file .*rows.jsonl: the server answers 404 Not Found",
            "Check the address",
        ),
        ({"status": 401}, "may not be read: the server answers 401", "netrc"),
        ({"status": 403}, "may not be read: the server answers 403", "expired"),
        ({"status": 418}, "cannot be read: the server answers 418", "Check the address"),
        ({"status": 502}, "was lost again and again: the server answers 502", "Try again later"),
        ({"kind": "text/html; charset=utf-8"}, "is a web page and not a file of rows", "raw"),
        ({"encoding": "br"}, r"is sent compressed \(br\)", "Download it"),
    ],
)
def test_what_a_server_refuses_is_said_in_a_sentence(
    site: Site, behaviour: dict[str, Any], message: str, hint: str
) -> None:
    for name, value in behaviour.items():
        setattr(site, name, value)
    with pytest.raises(DataError, match=message) as caught:
        read(f"{site.url}/a/rows.jsonl")
    assert "\n" not in caught.value.message
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("url", "message", "hint"),
    [
        ("http://example.org/rows.jsonl", "is not encrypted", "https"),
        ("https:///rows.jsonl", "is not the address of a file", "https://HOST"),
        ("https://example.org", "of a kind that cannot be read|is not the address", ""),
        ("https://[bad/rows.jsonl", "is not the address of a file", "https://HOST"),
        ("https://host:port/rows.jsonl", "is not the address of a file", "https://HOST"),
        ("https://example.org/rows", r"of a kind that cannot be read \(no suffix\)", ".jsonl"),
        ("https://example.org/rows-*.jsonl", "is a pattern", "Name each file"),
        ("https://example.org/rows.jsonl?token=…", "has lost its query", "fresh link"),
        ("file:///data/rows.jsonl", "addresses begin with https:// or s3://", "the path itself"),
        ("hf://datasets/org/name", "addresses begin with", "org/name"),
        ("gs://bucket/rows.jsonl", "addresses begin with", "Download it"),
        ("s3://bucket", "of a kind that cannot be read|is not the address of a file in S3", ""),
        ("s3://bucket/folder/", r"cannot be read \(no suffix\)", "s3://bucket/folder/*.jsonl"),
        ("s3://me:word@bucket/rows.jsonl", "bucket/rows.jsonl is not the address of a file in S3", "~/.aws"),
    ],
)
def test_mistyped_addresses_are_told_at_once(url: str, message: str, hint: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        open_source(url)
    assert hint in (caught.value.hint or "")
    assert "word" not in str(caught.value)


def test_an_unknown_host_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(
        DataError, match=r"the host no-such-host\.invalid is not known, or there is no network"
    ):
        read("https://no-such-host.invalid/rows.jsonl")


def test_a_name_of_a_split_that_files_do_not_have(site: Site) -> None:
    with pytest.raises(DataError, match="has no split 'dev'"):
        open_source(f"{site.url}/a/rows.jsonl", split="dev")


# ---------------------------------------------------------------- S3


class Bucket(MemoryFileSystem):
    """fsspec's file system in memory under the name of S3; `denied` are keys that may not be read."""

    protocol = "s3"
    store: dict[str, Any] = {}  # noqa: RUF012 as its base has it
    pseudo_dirs = [""]  # noqa: RUF012
    denied: Exception | None = None

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        if Bucket.denied is not None:
            raise Bucket.denied
        return super().info(path, **kwargs)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("s3://").strip("/")

    def glob(self, path: str, **kwargs: Any) -> dict[str, Any]:
        return {name.lstrip("/"): info for name, info in super().glob(path, **kwargs).items()}


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Bucket:
    monkeypatch.setattr(fsspec, "filesystem", {"s3": Bucket()}.__getitem__)
    monkeypatch.setattr(Bucket, "denied", None)
    Bucket.store.clear()
    files: Bucket = fsspec.filesystem("s3")
    for name in ("b", "a"):
        files.pipe(f"/bucket/dir/{name}.jsonl", json.dumps({"text": name}).encode())
    return files


def test_files_in_s3(bucket: Bucket) -> None:
    assert read("s3://bucket/dir/a.jsonl") == [{"text": "a"}]
    assert read("s3://bucket/dir/a.jsonl", streaming=True) == [{"text": "a"}]
    bucket.pipe("/bucket/dir/a.jsonl", CONTENT)
    assert read("s3://bucket/dir/a.jsonl") == ROWS
    assert read("s3://bucket/dir/a.jsonl", streaming=True) == ROWS
    assert len(copies()) == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_a_pattern_in_s3(bucket: Bucket, streaming: bool) -> None:
    bucket.pipe("/bucket/dir/folder.jsonl/part.txt", b"no row of the pattern")
    source = open_source("s3://bucket/dir/*.jsonl", streaming=streaming)
    assert [(row.where, row.record) for row in source.rows()] == [
        ("s3://bucket/dir/a.jsonl:1", {"text": "a"}),
        ("s3://bucket/dir/b.jsonl:1", {"text": "b"}),
    ]
    with pytest.raises(DataError, match="No file matches the pattern"):
        read("s3://bucket/dir/*.csv")


def test_parquet_in_s3_is_streamed_without_a_copy(bucket: Bucket) -> None:
    texts = [{"text": "one"}, {"text": "two"}]
    bucket.pipe("/bucket/rows.parquet", content_of("rows.parquet", texts))
    assert read("s3://bucket/rows.parquet", streaming=True) == texts
    assert not copies()


@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (PermissionError("Access Denied"), "may not be read with the credentials", "AWS_PROFILE"),
        (type("NoCredentialsError", (Exception,), {})("Unable to locate"), "needs credentials", "~/.aws"),
        (type("EndpointConnectionError", (Exception,), {})("x"), "cannot be reached", "AWS_ENDPOINT_URL"),
        (
            type("ParamValidationError", (ValueError,), {})("Invalid bucket\nmore"),
            "cannot be read: Invalid bucket",
            "",
        ),
    ],
)
def test_failures_of_s3_are_said_in_a_sentence(
    bucket: Bucket, error: Exception, message: str, hint: str
) -> None:
    Bucket.denied = error
    with pytest.raises(DataError, match=message) as caught:
        read("s3://bucket/dir/a.jsonl")
    assert hint in (caught.value.hint or "")
    assert "\n" not in caught.value.message


def test_what_is_not_there_and_folders_in_s3(bucket: Bucket) -> None:
    with pytest.raises(DataError, match=r"There is no file s3://bucket/dir/c\.jsonl"):
        read("s3://bucket/dir/c.jsonl")
    bucket.pipe("/bucket/odd.jsonl/part-0.jsonl", b"{}")
    with pytest.raises(DataError, match=r"s3://bucket/odd\.jsonl is a folder") as caught:
        read("s3://bucket/odd.jsonl")
    assert "s3://bucket/odd.jsonl/*.jsonl" in (caught.value.hint or "")


def test_s3_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> Any:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(UserError, match="needs the package s3fs") as caught:
        read("s3://bucket/dir/a.jsonl")
    assert "tunesmith[s3]" in (caught.value.hint or "")
