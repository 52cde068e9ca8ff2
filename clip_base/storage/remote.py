"""Files at addresses: `https://`, and through fsspec `s3://`, `gs://` and `hf://`.

Two ways lead to their content. What is read whole, or at several places (weights, tables, JSON), is copied
into the cache, see `clip_base.storage.remote_cache`. Tars are read as they arrive, see `RemoteFile` and
`read_range`, and never lie here whole.

A connection that is cut, stalls or is refused for now is made again, later each time, from the byte reached.
"""

from __future__ import annotations

import contextlib
import io
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from clip_base.runtime.errors import InputError

ATTEMPTS = 4  # in a row that bring nothing new
PAUSE = 1.0  # seconds before the second attempt; doubled each time
TIMEOUT = 30.0  # seconds without a byte
_BLOCK = 1 << 23  # bytes that one request to an object store asks for
CHUNK = 1 << 18  # bytes handed on at once
_SKIP = 1 << 20  # bytes that are rather thrown away than a new connection made for what follows
# A pathlib.Path makes one slash of an address's two.
_ADDRESS = re.compile(r"(s3|gs|gcs|hf|https?):/{1,2}(?!/)(.+)", re.DOTALL)
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}
_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE (for a public bucket "
    "FSSPEC_S3_ANON=true)",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS (for a public bucket FSSPEC_GS_TOKEN=anon)",
    "gcs": "set GOOGLE_APPLICATION_CREDENTIALS (for a public bucket FSSPEC_GCS_TOKEN=anon)",
    "hf": "set HF_TOKEN",
    "http": "the address must be one that needs no login, such as a presigned one",
}
Result = TypeVar("Result")
_REFUSALS = ("PermissionError", "GatedRepoError", "GoogleAuthError", "HttpError401")
_ABSENT = ("FileNotFoundError", "RepositoryNotFoundError", "RevisionNotFoundError", "EntryNotFoundError")


class RemoteError(InputError):
    """An address cannot be read or written.

    Attributes:
        address: which.
        reason: why, without the address.
        absent: whether the server says that there is nothing.
    """

    def __init__(self, address: str, reason: str, absent: bool = False) -> None:
        super().__init__(f"{address} cannot be used: {reason}")
        self.address, self.reason, self.absent = address, reason, absent

    def __reduce__(self) -> tuple[type[RemoteError], tuple[str, str, bool]]:
        return RemoteError, (self.address, self.reason, self.absent)


def address_of(path: str | Path) -> str | None:
    """Returns the address that a text is, or that a Path was made of; None: it is a path on this machine."""
    found = _ADDRESS.fullmatch(str(path))
    return f"{found[1]}://{found[2]}" if found else None


def name_of(address: str) -> str:
    """Returns the last part of an address, without a query."""
    return address.partition("?")[0].rstrip("/").rpartition("/")[2]


def filesystem(address: str) -> tuple[Any, str]:
    """Returns fsspec's file system for an address, and the address as that knows it.

    Raises:
        RemoteError: the package that knows the scheme is not installed.
    """
    scheme = address.partition("://")[0]
    try:
        import fsspec.core  # noqa: PLC0415 (optional)

        found: tuple[Any, str] = fsspec.core.url_to_fs(address)
    except ImportError:
        needed = f"{scheme}:// needs the package {_PACKAGES[scheme]}"
        raise RemoteError(address, f"{needed}; install it with `pip install 'regionclip[remote]'`") from None
    except ValueError as error:
        raise RemoteError(address, " ".join(str(error).split())) from None
    return found


class _Stream(Protocol):
    """What one connection brings: `read` gives at most so many bytes, none at its end.

    Attributes:
        begin: the place of its first byte.
        size: bytes of the whole file; None: not told.
        version: what changes with the content; "": not told.
    """

    begin: int
    size: int | None
    version: str

    def read(self, count: int, /) -> bytes: ...

    def close(self) -> None: ...


class _HttpStream:
    """A server's answer to a request for all from a byte on, or for `count` bytes."""

    def __init__(self, address: str, start: int, timeout: float, count: int | None = None) -> None:
        last = "" if count is None else start + count - 1
        headers = {"Range": f"bytes={start}-{last}"} if start or count is not None else {}
        self.begin, self.version = 0, ""
        self.size: int | None = None
        try:
            self._answer: Any = urllib.request.urlopen(
                urllib.request.Request(address, headers=headers), timeout=timeout
            )
        except urllib.error.HTTPError as error:
            if error.code != 416 or not start:
                raise
            self._answer, self.begin, self.size = io.BufferedReader(io.BytesIO()), start, start
            return
        told = self._answer.headers
        if self._answer.status == 206:
            place = re.match(r"bytes (\d+)-(\d+)/(\d+|\*)", str(told.get("Content-Range", "")))
            if place is None or int(place[1]) != start:
                raise ConnectionError("the server sends another part of the file than it was asked for")
            self.begin, self.size = start, None if place[3] == "*" else int(place[3])
        length = told.get("Content-Length", "")
        if self.size is None and length.isdigit() and count is None:
            self.size = self.begin + int(length)
        self.version = told.get("ETag") or told.get("Last-Modified") or ""

    def read(self, count: int, /) -> bytes:
        return bytes(self._answer.read1(count))

    def close(self) -> None:
        self._answer.close()


class _StoreStream:
    """An object of a store, asked for block by block."""

    def __init__(self, address: str, start: int) -> None:
        self._files, self._path = filesystem(address)
        info = self._files.info(self._path)
        if info.get("type") == "directory":
            raise RemoteError(address, "it is a folder; give a file")
        self.begin, self._end = start, int(info["size"])
        self.size: int | None = self._end
        self.version = version_of(info)
        self._at, self._held = start, b""

    def read(self, count: int, /) -> bytes:
        if not self._held and self._at < self._end:
            wanted = min(_BLOCK, self._end - self._at)
            self._held = self._files.cat_file(self._path, start=self._at, end=self._at + wanted)
            if len(self._held) != wanted:
                raise ConnectionError(f"{len(self._held)} bytes came of {wanted} that were asked for")
            self._at += wanted
        part, self._held = self._held[:count], self._held[count:]
        return part

    def close(self) -> None:
        self._held = b""


def version_of(info: dict[str, Any]) -> str:
    """Returns what changes with an object's content, from what its store says of it."""
    keys = ("ETag", "etag", "crc32c", "md5Hash", "blob_id", "oid", "LastModified", "mtime", "updated", "size")
    return " ".join(f"{key}={info[key]}" for key in keys if info.get(key) is not None)


class RemoteFile(io.RawIOBase):
    """A file at an address, read from front to back; it can be sought in, which makes a new connection.

    Args:
        address: of the file.
        start: the first byte that is wanted.
        timeout: seconds without a byte after which the connection is closed and made again (https).
        pause: seconds before the second attempt, doubled each time.

    Attributes:
        size: in bytes; None when the server does not tell.
        version: what changes with the content; "" when the server does not tell.

    Raises:
        RemoteError: it is not there or may not be read, a package or credentials are missing, the server
            cannot be reached, or the file changes while it is read.
    """

    def __init__(
        self, address: str, start: int = 0, timeout: float = TIMEOUT, pause: float | None = None
    ) -> None:
        super().__init__()
        self.address, self._timeout, self._pause = address, timeout, PAUSE if pause is None else pause
        self.size: int | None = None
        self.version = ""
        self._position, self._stream_at = start, 0
        self._stream: _Stream | None = None
        self._fruitless, self._brought, self._known = 0, False, False
        self._parts = True  # until the server sends all where a part was asked for
        while self._stream is None:
            with self._again():
                self._connect()

    def readable(self) -> bool:
        """Returns True."""
        return True

    def seekable(self) -> bool:
        """Returns True."""
        return True

    def tell(self) -> int:
        """Returns the place of the next byte."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Goes to a byte; whence as in `io.IOBase.seek`."""
        if whence == io.SEEK_END and self.size is None:
            raise RemoteError(self.address, "the server does not tell how long it is")
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position}.get(whence, self.size or 0)
        return self._position

    def close(self) -> None:
        """Closes the connection."""
        self._drop()
        super().close()

    def readinto(self, buffer: Any, /) -> int:
        """Reads what has arrived, at most as much as the buffer holds; 0 at the end."""
        view = memoryview(buffer).cast("B")
        while self.size is None or self._position < self.size:
            with self._again():
                stream = self._stream
                if stream is None or self._stream_at > self._position:
                    self._drop()
                    stream = self._connect()
                behind = self._position - self._stream_at  # of a server that sends no parts, or after a seek
                if behind > _SKIP and self._parts:
                    self._drop()
                    continue
                data = stream.read(min(behind, CHUNK) if behind else min(len(view), CHUNK))
                self._stream_at += len(data)
                if not data:
                    if self.size is None:
                        return 0
                    raise ConnectionError("the connection was cut")
                self._brought = self._brought or not behind
                if not behind:
                    view[: len(data)] = data
                    self._position += len(data)
                    return len(data)
        return 0

    def _connect(self) -> _Stream:
        start = self._position
        stream: _Stream
        if address_is_http(self.address):
            stream = _HttpStream(self.address, start, self._timeout)
        else:
            stream = _StoreStream(self.address, start)
        self._stream, self._stream_at, self._brought = stream, stream.begin, False
        self._parts = self._parts and (not start or stream.begin == start)
        told = (stream.size, stream.version)
        if self._known and all(told) and told != (self.size, self.version):
            raise RemoteError(self.address, "it changed while it was read; give the same command again")
        if not self._known or self.size is None:
            self.size, self.version = told
        self._known = True
        return stream

    def _drop(self) -> None:
        if self._stream is not None:
            with contextlib.suppress(Exception):
                self._stream.close()
        self._stream = None

    @contextlib.contextmanager
    def _again(self) -> Iterator[None]:
        """Sleeps after a fault that may pass; others, and too many in a row, are RemoteErrors."""
        try:
            yield
        except Exception as error:
            self._drop()
            self._fruitless = 0 if self._brought else self._fruitless + 1
            self._brought = False
            if not passes(error) or self._fruitless >= ATTEMPTS:
                raise told(self.address, error) from error
            time.sleep(self._pause * 2**self._fruitless / 2)


def address_is_http(address: str) -> bool:
    """Whether an address is a web server's, which needs no package."""
    return address.startswith(("http://", "https://"))


def open_remote(address: str) -> BinaryIO:
    """Opens a file for reading from front to back, see `RemoteFile`."""
    return io.BufferedReader(RemoteFile(address), CHUNK)


def repeated(address: str, call: Callable[[], Result]) -> Result:
    """Returns what a call returns, which is repeated, later each time, after faults that may pass.

    Raises:
        RemoteError: the last fault, or one that does not pass.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except Exception as error:
            if not passes(error) or attempt == ATTEMPTS:
                raise told(address, error) from error
            time.sleep(PAUSE * 2**attempt / 2)
    raise AssertionError


def read_range(address: str, start: int, count: int) -> bytes:
    """Returns `count` bytes of a file from `start` on, fewer where it ends; one request when all goes well.

    Raises:
        RemoteError: as RemoteFile's.
    """
    return repeated(address, lambda: _range_once(address, start, count))


def _range_once(address: str, start: int, count: int) -> bytes:
    if not address_is_http(address):
        files, path = filesystem(address)
        return bytes(files.cat_file(path, start=start, end=start + count))
    with contextlib.closing(_HttpStream(address, start, TIMEOUT, count)) as stream:
        _exactly(stream, start - stream.begin)  # of a server that sends no parts
        data = _exactly(stream, count)
        if len(data) < count and (stream.size is None or start + len(data) < stream.size):
            raise ConnectionError("the connection was cut")
        return data


def _exactly(stream: _HttpStream, count: int) -> bytes:
    parts, left = [], count
    while left and (part := stream.read(left)):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def passes(error: Exception) -> bool:
    """Whether what went wrong may go well a moment later."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code >= 500 or error.code in (408, 425, 429)
    if isinstance(error, InputError | ImportError):
        return False
    kinds = _kinds(error)
    return not (kinds & {*_REFUSALS, *_ABSENT} or any("Credential" in kind for kind in kinds))


def told(address: str, error: Exception) -> RemoteError:
    """Returns what the user is told about an error of a server, a network or a package below."""
    if isinstance(error, RemoteError):
        return error
    is_absent = bool(_kinds(error) & set(_ABSENT)) or getattr(error, "code", 0) in (404, 410)
    return RemoteError(address, _reason(address, error), is_absent)


def _reason(address: str, error: Exception) -> str:
    kinds, scheme = _kinds(error), address.partition("://")[0]
    if isinstance(error, urllib.error.HTTPError):
        remedy = f" ({_CREDENTIALS['http']})" if error.code in (401, 403) else ""
        return f"the server answers {error.code} {error.reason}{remedy}"
    if kinds & set(_ABSENT):
        return "there is no such file (or it may not be seen without credentials)"
    if kinds & set(_REFUSALS) or any("Credential" in kind for kind in kinds):
        return f"access is refused, or credentials are missing: {_CREDENTIALS.get(scheme, 'see its server')}"
    if isinstance(error, TimeoutError):
        return "the server has stopped sending"
    if isinstance(error, urllib.error.URLError):
        return f"the server cannot be reached: {error.reason}"
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def _kinds(error: Exception) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}
