"""Reading of user files, and atomic writing: a file appears complete or not at all."""

from __future__ import annotations

import codecs
import contextlib
import errno
import gzip
import io
import json
import os
import re
import shutil
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from charset_normalizer import from_bytes

from clip_base.runtime.announce import announced
from clip_base.runtime.errors import InputError, quote
from clip_base.storage.kinds import EMPTY, HEAD, JSON, instead, kind_of_bytes
from clip_base.storage.limits import require_unpacked
from clip_base.storage.remote import address_of
from clip_base.storage.remote_cache import exists_at, fetch

if sys.platform != "win32":
    import resource

GZIPPED = b"\x1f\x8b"
ENCODING_HELP = "encoding of the texts, such as gb18030 or cp1252; empty: UTF-8"
_UTF8 = "utf-8-sig"
_BLOCK = 1 << 20  # bytes decoded at once to find the place of a bad one
_GZIP_BLOCK = 1 << 24
_SAMPLE = 1 << 16  # bytes from which an encoding is guessed
_TEMPORARY = re.compile(r"\..+\.(\d{1,9})\.tmp")  # what `replacing` calls a file, with the process's number
_LOADED = time.time()
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16's, which it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def existing(path: str | Path, what: str = "file") -> Path:
    """Returns `path` when it exists; of an address, the copy in the cache, see `remote_cache.fetch`.

    Raises:
        InputError: it does not exist, and the nearest folder that does; the address cannot be read.
    """
    address = address_of(path)
    if address is not None:
        return fetch(address, what)
    path = Path(path)
    try:
        if path.exists():
            return path
        parent = next((folder for folder in path.absolute().parents if folder.exists()), Path("/"))
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise InputError(f"{what} {quote(str(path))} cannot be opened: {error.strerror}") from None
    except ValueError as error:  # NUL, half a surrogate
        raise InputError(f"{what} {quote(str(path))} cannot be opened: {error}") from None
    raise InputError(f"{what} {path} does not exist ({parent} is the last folder on that path which does)")


def absolute_path(path: str | Path) -> str:
    """Returns an absolute path; an address as it is."""
    return address_of(path) or str(Path(path).absolute())


def beside(path: str | Path, ending: str) -> Path | None:
    """Returns the file whose name is another's with an ending behind it; None: there is none.

    Raises:
        InputError: `path` is an address that cannot be read.
    """
    address = address_of(path)
    if address is None:
        file = Path(f"{path}{ending}")
        return file if file.exists() else None
    return fetch(address + ending) if exists_at(address + ending) else None


def existing_file(path: str | Path, what: str = "file") -> Path:
    """Returns `path` when it is a regular file, the only kind that is opened: a named pipe would block."""
    path = existing(path, what)
    if path.is_dir():
        raise InputError(f"{what} {path} is a folder; give a file")
    if not path.is_file():
        raise InputError(f"{what} {path} is not a regular file (a pipe or a device); give a file")
    return path


def is_file(text: str | Path) -> bool:
    """Whether a text, which may be something else, is the path of a file, or an address."""
    if address_of(text) is not None:
        return True
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long for a path; a NUL in it
        return False


def is_folder(path: Path) -> bool:
    """Whether there is a folder at a path, which may be none that the system knows."""
    try:
        return path.is_dir()
    except (OSError, ValueError):  # too long; Python before 3.12 raises ValueError for NUL
        return False


def read_text(path: str | Path, what: str = "file", encoding: str | None = None) -> str:
    """Reads a text file.

    Args:
        path: the file; a byte order mark at its beginning is dropped.
        what: what the file is to the user, for messages.
        encoding: of the text; "" is UTF-8. None: UTF-8, and the user has no option to say otherwise.

    Raises:
        InputError: the file is missing, unreadable or not in that encoding; the line is named, and the
            encoding that it looks like.
    """
    path = existing_file(path, what)
    return decode_text(_bytes_of(path, what), f"{what} {path}", encoding)


def decode_text(data: bytes, where: str, encoding: str | None = None) -> str:
    """Returns the text that `data` encodes, see `read_text`; `where` names it in messages."""
    codec = _codec(encoding)
    if codec == _UTF8 and b"\0" in data:  # UTF-16 of plain letters is valid UTF-8
        raise InputError(_no_text(where, "it holds NUL bytes", data[:_SAMPLE], data[:_SAMPLE], encoding))
    try:
        return data.decode(codec)
    except UnicodeDecodeError:
        raise InputError(_undecodable(io.BytesIO(data), where, codec, encoding)) from None


@contextlib.contextmanager
def open_text(path: str | Path, what: str = "file", encoding: str | None = None) -> Iterator[TextIO]:
    """Opens a text file for reading piece by piece, line ends untouched; errors as `read_text`'s."""
    path, codec = existing_file(path, what), _codec(encoding)
    try:
        raw = path.open("rb")
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read: {error.strerror}") from None
    with raw:
        head = raw.read(_SAMPLE)
        if codec == _UTF8 and b"\0" in head:
            raise InputError(_no_text(f"{what} {path}", "it holds NUL bytes", head, head, encoding))
        raw.seek(0)
        try:
            yield io.TextIOWrapper(raw, encoding=codec, newline="")
        except UnicodeDecodeError:
            with path.open("rb") as again:
                message = _undecodable(again, f"{what} {path}", codec, encoding)
            raise InputError(message) from None


def read_json(path: str | Path, what: str = "JSON file") -> Any:
    """Reads a JSON file, gzipped or not.

    Raises:
        InputError: the file is missing, empty or malformed; the file and the place in it are named.
    """
    path = existing_file(path, what)
    with announced(f"reading {what} {path}"):
        content = _bytes_of(path, what)
        if content.startswith(GZIPPED):
            try:
                content = _unpacked(content, f"{what} {path}")
            except (OSError, EOFError, zlib.error) as error:
                raise InputError(f"{what} {path} cannot be unpacked ({error}); was it truncated?") from None
        kind = kind_of_bytes(content[:HEAD])
        if kind not in ("", EMPTY, JSON):
            raise InputError(f"{what} {path} is {kind}, and a file of JSON is needed")
        text = decode_text(content, f"{what} {path}")
        if not text.strip():
            raise InputError(f"{what} {path} is empty; write it again or give another path")
        return parse_json(text, f"{what} {path}")


def _unpacked(packed: bytes, where: str) -> bytes:
    """Returns what gzip has packed; stops where it is more than the limits say."""
    blocks, size = [], 0
    with gzip.GzipFile(fileobj=io.BytesIO(packed)) as file:
        while block := file.read(_GZIP_BLOCK):
            size += len(block)
            require_unpacked(size, len(packed), where)
            blocks.append(block)
    return b"".join(blocks)


def read_json_lines(
    path: str | Path, what: str = "JSON Lines file", encoding: str | None = None
) -> Iterator[tuple[int, Any]]:
    """Yields the number and the value of each line that is not empty, as it is read.

    Raises:
        InputError: the file is missing, not in that encoding, or a line is not valid JSON.
    """
    with open_text(path, what, encoding) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            yield number, parse_json(line, f"{what} {path}, line {number}", one_line=True)


def read_log(path: str | Path, what: str, keys: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Reads what a job appends to line by line: JSON objects; the last line may be cut off by a kill.

    Args:
        path: the file.
        what: what it is to the user, for messages.
        keys: which each object must have.

    Raises:
        InputError: another line than the last one is damaged.
    """
    lines = _bytes_of(existing_file(path, what), what).splitlines()
    found: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            entry = None
        if isinstance(entry, dict) and all(key in entry for key in keys):
            found.append(entry)
        elif number < len(lines):
            shown = quote(line.decode("utf-8", "replace"))
            raise InputError(f"{what} {path}, line {number} is damaged: {shown}; correct or delete that line")
    return found


def parse_json(text: str, where: str, one_line: bool = False) -> Any:
    """Returns what a JSON text holds; InputError, with `where` and the place in it, when it is malformed."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        fault = json_fault(error, "" if one_line else f" at line {error.lineno}, column {error.colno}")
    except (ValueError, RecursionError) as error:
        fault = json_fault(error)
    raise InputError(f"{where} is not valid JSON: {fault}")


def json_fault(error: ValueError | RecursionError, place: str = "") -> str:
    """Returns what json's decoder found wrong, for a message; `place` is such as " at line 3"."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')}{place}; was it truncated when it was copied?"
    if isinstance(error, RecursionError):
        return f"lists or objects are nested too deeply{place}; write it flat"
    return f"a whole number has too many digits{place}; write a smaller one"


def _bytes_of(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read: {error.strerror}") from None


def _codec(encoding: str | None) -> str:
    """Returns the codec to decode with. Spreadsheets write a byte order mark, which utf-8-sig drops."""
    try:
        name = codecs.lookup(encoding or "utf-8").name
        io.TextIOWrapper(io.BytesIO(), name)  # "base64" is a codec, but none of texts
    except LookupError:
        raise InputError(
            f"unknown encoding {quote(encoding)}; known are utf-8, cp1252, gb18030, utf-16 and others"
        ) from None
    return _UTF8 if name == "utf-8" else name


def _undecodable(file: BinaryIO, where: str, codec: str, encoding: str | None) -> str:
    """Returns a message that names the first bad byte's line and the encoding that the file looks like."""
    # The decoder of utf-8-sig never ends with half a byte order mark.
    decoder, line, head = codecs.getincrementaldecoder("utf-8" if codec == _UTF8 else codec)(), 1, b""
    while True:
        block = file.read(_BLOCK)
        head = head or block[:4]
        try:
            decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            line += error.object.count(b"\n", 0, error.start)
            data = error.object[error.object.rfind(b"\n", 0, error.start) + 1 :][:_SAMPLE]
            byte = error.object[error.start]
            break
        if not block:
            return f"{where} changed while it was read; try again"
        line += block.count(b"\n")
    used = "UTF-8" if codec == _UTF8 else codec
    return _no_text(where, f"it is not {used}: byte 0x{byte:02X} in line {line}", head, data, encoding)


def _no_text(where: str, problem: str, head: bytes, data: bytes, encoding: str | None) -> str:
    """Returns a message: the problem, what the bytes look like, how to fix it."""
    found = _looks_like(head, data)
    if found is None:
        what = instead(head) or "; is it the right file?"
        return f"{where} cannot be read as text: {problem}{what}"
    name, sample = found
    remedy = "save it as UTF-8" if encoding is None else f"save it as UTF-8 or give encoding={name}"
    return f"{where} cannot be read: {problem}; it looks like {name} ({quote(sample, 40)}); {remedy}"


def _looks_like(head: bytes, data: bytes) -> tuple[str, str] | None:
    """Returns the encoding that a text looks like and some of its text; None: it looks like no text."""
    marked = next((name for mark, name in _MARKS.items() if head.startswith(mark)), None)
    if marked is not None:
        width = 2 if marked == "utf-16" else 4
        mark = head[:width] if not data.startswith(head[:width]) else b""
        whole = mark + data[: (len(data) - len(mark)) // width * width]
        return marked, _first_words(whole.decode(marked, errors="replace"))
    foreign = b"\n".join(line for line in data.split(b"\n") if not line.isascii())
    runs = re.findall(rb"[\x80-\xff]+", foreign)
    # Accented letters stand alone among plain ones; a text in another script, or of two bytes a character,
    # has them in rows. Statistics, which charset-normalizer is good at, need more than a word or two.
    if b"\0" not in data and 2 * sum(len(run) == 1 for run in runs) > len(runs):
        with contextlib.suppress(UnicodeDecodeError):
            return "cp1252", _first_words(foreign.decode("cp1252"))
    wide = b"\0" in data
    best = from_bytes(data if wide else foreign, cp_exclusion=None if wide else ["utf_16", "utf_32"]).best()
    if best is None or (wide and not best.encoding.startswith(("utf_16", "utf_32"))):
        return None
    return best.encoding.replace("_", "-"), _first_words(str(best))


def _first_words(text: str) -> str:
    lines = (" ".join(line.split()) for line in text.splitlines())
    return next((line for line in lines if not line.isascii()), "") or " ".join(text.split())[:40]


def make_folder(path: str | Path) -> Path:
    """Returns a folder, which is made with those above it where they are missing.

    Raises:
        InputError: a file stands in its place.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        file = next(place for place in (path, *path.parents) if place.exists())
        raise InputError(f"{file} is a file; give a folder") from None
    return path


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is flushed to disk and renamed over `path`.

    When the body raises (a full disk, say), the temporary file is removed and `path` is left as it was.
    """
    path = Path(path)
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # the umask's; some libraries make files private
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes `text` to `path` atomically; half a surrogate pair, which UTF-8 lacks, as `\\ud800`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: str | Path, value: Any, indent: int | None = None) -> None:
    """Writes `value` as JSON to `path` atomically."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def sweep(paths: Iterable[Path]) -> None:
    """Deletes those of some files that `replacing` has left in processes that were killed.

    Those of running processes stay, and of this one's what it has written itself.
    """
    if sys.platform == "win32":  # which has no way to ask for a process without harming it
        return
    for path in paths:
        found = _TEMPORARY.fullmatch(path.name)
        if found is None:
            continue
        process = int(found[1])
        with contextlib.suppress(OSError):
            if not runs_here(process) or (process == os.getpid() and path.stat().st_mtime < _LOADED):
                path.unlink()


def runs_here(process: int) -> bool:
    """Whether a process of this number runs; after a restart it may be another one's."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True


@contextlib.contextmanager
def naming_full_disk(path: Path, *kinds: type[Exception]) -> Iterator[None]:
    """Turns a library's own error (one of `kinds`) into an OSError when it stems from a lack of room.

    That is a full disk (ENOSPC) or the limit on a file's size (EFBIG, `ulimit -f`). torch and safetensors
    write through code of their own and do not raise OSError.
    """
    try:
        yield
    except kinds as error:
        number = _lack_of_room(path, str(error))
        if number:
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


def _lack_of_room(path: Path, told: str) -> int:
    """Returns the number of the system's error that stopped a library's writing to `path`; 0 for another."""
    for number in (errno.ENOSPC, errno.EFBIG):
        if f"(os error {number})" in told:
            return number
    # The part that was written has taken what was left; torch does not tell why it stopped.
    if shutil.disk_usage(path.parent).free < 1 << 16:
        return errno.ENOSPC
    if sys.platform == "win32":
        return 0
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    written = path.iterdir() if path.is_dir() else path.parent.glob(f"*{path.name}*")
    reached = limit != resource.RLIM_INFINITY and any(file.stat().st_size >= limit for file in written)
    return errno.EFBIG if reached else 0
