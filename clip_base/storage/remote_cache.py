"""Copies of remote files and folders, one per version, in the cache.

`clip_base.storage.files.existing` makes one of whatever is given as a path and is an address. The cache is
never emptied: delete `remote` in it to make room.
"""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path
from typing import Any

from filelock import FileLock

from clip_base.runtime.errors import quote
from clip_base.runtime.progress import Progress
from clip_base.storage.remote import (
    CHUNK,
    RemoteError,
    RemoteFile,
    address_is_http,
    filesystem,
    name_of,
    repeated,
    version_of,
)

MOST_FILES = 10_000  # of a folder that is copied
_MIB = 1 << 20


def cache_folder() -> Path:
    """Returns the folder of what was fetched: $CLIP_BASE_CACHE, else ~/.cache/clip, as openai/CLIP."""
    return Path(os.environ.get("CLIP_BASE_CACHE") or Path.home() / ".cache" / "clip").expanduser()


def listing(address: str, ending: str = "") -> list[str]:
    """Returns the addresses of the files in a folder and those below it, or that fit a pattern, sorted.

    Raises:
        RemoteError: a web server, which has no list; the store cannot be read.
    """
    return [found for found, _ in _entries(address) if found.endswith(ending)]


def _entries(address: str) -> list[tuple[str, dict[str, Any]]]:
    if address_is_http(address):
        raise RemoteError(address, "a web server lists no folders; name the files, such as {0000..0009}.tar")
    scheme = address.partition("://")[0]
    files, path = filesystem(address)
    files.invalidate_cache()
    find = files.glob if any(mark in path for mark in "*?[") else files.find
    found = repeated(address, lambda: find(path, detail=True))
    return sorted((f"{scheme}://{name}", info) for name, info in found.items() if info["type"] == "file")


def is_folder(address: str) -> bool:
    """Whether an address is a folder of a store; of web servers nothing is.

    Raises:
        RemoteError: the store cannot be read.
    """
    if address_is_http(address):
        return False
    files, path = filesystem(address)
    return repeated(address, lambda: bool(files.isdir(path)))


def exists_at(address: str) -> bool:
    """Whether there is a file.

    Raises:
        RemoteError: it cannot be found out.
    """
    try:
        RemoteFile(address).close()
    except RemoteError as error:
        if error.absent:
            return False
        raise
    return True


@functools.lru_cache(maxsize=4096)
def fetch(address: str, what: str = "file") -> Path:
    """Returns the copy of a file, or of a folder with all in it, in the cache; makes it when there is none.

    A process sees one version of an address. Another version gets a copy of its own.

    Args:
        address: of the file or folder.
        what: what it is to the user, for messages.

    Raises:
        RemoteError: see `RemoteFile`; or a folder holds more than MOST_FILES files.
    """
    place = cache_folder() / "remote" / digest(address)
    if not is_folder(address):
        return _fetch_file(address, place)
    entries = _entries(address)
    if len(entries) > MOST_FILES:
        raise RemoteError(
            address,
            f"{what} {quote(name_of(address))} has {len(entries):,} files, and folders of up to "
            f"{MOST_FILES:,} are copied; pack images into webdataset tars, or copy it and give the path",
        )
    base = address.rstrip("/") + "/"
    version = digest(*(f"{found} {version_of(info)}" for found, info in entries))
    target = place / version / name_of(address)
    target.mkdir(parents=True, exist_ok=True)
    with FileLock(place / version / f".{target.name}.lock"):
        for found, info in entries:
            file = target / found.removeprefix(base)
            if not (file.is_file() and file.stat().st_size == info["size"]):
                with RemoteFile(found) as source:
                    if source.version != version_of(info):
                        raise RemoteError(found, "it changed while it was read; give the same command again")
                    copy(source, file)
    return target


def _fetch_file(address: str, place: Path) -> Path:
    with RemoteFile(address) as source:
        target = place / digest(source.version, str(source.size)) / name_of(address)
        is_known = bool(source.version)  # else nothing tells a new content from the old one
        if is_known and target.is_file():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{target.name}.lock")):
            if not (is_known and target.is_file()):
                copy(source, target, resume=is_known)
    return target


def copy(source: RemoteFile, target: Path, resume: bool = True) -> None:
    """Writes a file beside its place, resumes after what an earlier call has left there, and renames it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    if not resume:
        part.unlink(missing_ok=True)
    receive(source, part)
    part.replace(target)


def receive(source: RemoteFile, part: Path) -> None:
    """Appends to a file what it lacks; shows progress."""
    start = part.stat().st_size if part.exists() else 0
    source.seek(start)
    total = -(-source.size // _MIB) if source.size else None
    with (
        Progress(f"{name_of(source.address)} (MiB)", total, start // _MIB) as progress,
        part.open("ab") as out,
    ):
        while chunk := source.read(CHUNK):
            out.write(chunk)
            progress.advance(out.tell() // _MIB - progress.done)


def digest(*texts: str) -> str:
    """Returns a short name for some texts."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
