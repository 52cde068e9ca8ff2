"""Reading what people give and writing what must survive a kill: every file appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import gzip
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clip_base.errors import InputError

GZIPPED = b"\x1f\x8b"


def existing(path: str | Path, what: str = "file") -> Path:
    """Returns `path` when it exists; otherwise an InputError that names the nearest folder that does."""
    path = Path(path)
    if path.exists():
        return path
    parent = next((folder for folder in path.absolute().parents if folder.exists()), Path("/"))
    raise InputError(f"{what} {path} does not exist ({parent} is the last folder on that path which does)")


def read_json(path: str | Path, what: str = "JSON file") -> Any:
    """Reads a JSON file, gzipped or not.

    Raises:
        InputError: the file is missing, empty or malformed; the file and the place in it are named.
    """
    path = existing(path, what)
    content = path.read_bytes()
    if content.startswith(GZIPPED):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{what} {path} does not unpack ({error}); was it cut off?") from None
    text = content.decode("utf-8", errors="replace")
    if not text.strip():
        raise InputError(f"{what} {path} is empty; write it again or give another path")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{what} {path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}; "
            "was it cut off while being copied?"
        ) from None


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is flushed to disk and renamed over `path`.

    When the body raises (a full disk, say), the temporary file is removed and `path` is left as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes `text` to `path` atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any, indent: int | None = None) -> None:
    """Writes `value` as JSON to `path` atomically."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def naming_full_disk(path: Path, *kinds: type[Exception]) -> Iterator[None]:
    """Turns a library's own error (one of `kinds`) into OSError(ENOSPC) when it stems from a full disk.

    torch and safetensors write through code of their own and do not raise OSError.
    """
    try:
        yield
    except kinds as error:
        told = f"(os error {errno.ENOSPC})" in str(error)
        # The part that was written has taken what was left; torch does not tell why it stopped.
        if told or shutil.disk_usage(path.parent).free < 1 << 16:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
