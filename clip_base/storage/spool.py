"""Uncompressed copies of gzipped tars, of the few that are read at a time."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from clip_base.runtime.errors import InputError
from clip_base.storage.files import GZIPPED, make_folder, replacing
from clip_base.storage.tars import Member, open_shard

_TRIES = 5  # that a copy may be dropped by another process between finding and opening it


def is_gzipped(tar: Path) -> bool:
    """Whether a tar is compressed, so that its members cannot be read alone."""
    with tar.open("rb") as file:
        return file.read(len(GZIPPED)) == GZIPPED


class TarSpool:
    """Copies of tars in a folder; any number of processes may share one.

    Args:
        folder: for the copies.
        keep: how many there may be; that which was asked for the longest ago is dropped.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def path(self, tar: Path) -> Path:
        """Returns the copy of a tar, which is made when there is none."""
        name = f"{hashlib.sha256(str(tar.absolute()).encode()).hexdigest()[:16]}.tar"
        copy = make_folder(self.folder) / name
        if not copy.exists():
            with FileLock(self.folder / f"{name}.lock"):
                if not copy.exists():
                    self._make_room()
                    self._copy(tar, copy)
        try:
            os.utime(copy)
        except FileNotFoundError:  # another process has made room
            return self.path(tar)
        return copy

    def _copy(self, tar: Path, copy: Path) -> None:
        try:
            with (
                open_shard(tar) as packed,
                gzip.GzipFile(fileobj=packed) as source,
                replacing(copy) as temporary,
                temporary.open("wb") as target,
            ):
                shutil.copyfileobj(source, target, 1 << 20)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"tar {tar} cannot be unpacked ({error}); was it truncated?") from None

    def _make_room(self) -> None:
        copies = []
        for path in self.folder.glob("*.tar"):
            try:
                copies.append((path.stat().st_mtime_ns, path))
            except FileNotFoundError:
                continue
        for _, path in sorted(copies)[: max(len(copies) + 1 - self.keep, 0)]:
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class SpooledMember:
    """A file inside a gzipped tar, read from the tar's copy.

    Attributes:
        spool: holds the copies.
        tar: the gzipped tar.
        offset: of its first byte in the uncompressed tar.
        size: in bytes.
    """

    spool: TarSpool
    tar: Path
    offset: int
    size: int

    def read_bytes(self) -> bytes:
        """Returns its content."""
        for _ in range(_TRIES):
            try:
                return Member(self.spool.path(self.tar), self.offset, self.size).read_bytes()
            except FileNotFoundError:
                continue
        raise InputError(f"the copies in {self.spool.folder} are dropped as fast as they are made")

    def __str__(self) -> str:
        return f"{self.tar} at byte {self.offset} (uncompressed)"
