"""Tar archives: where their members are, and reading them from the start without unpacking.

Uncompressed tars can be sought in: each tar's headers are read once, and from then on a member is where its
bytes are, at an address too, where it costs a request. What cannot be sought in (a `.tar.gz`), or is wanted
whole, is read from its start, see `stream`.
"""

# M members of a tar
from __future__ import annotations

import functools
import glob
import gzip
import hashlib
import io
import json
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import numpy.typing as npt
from webdataset.shardlists import expand_urls

from clip_base.runtime.errors import InputError, note
from clip_base.storage.files import GZIPPED, existing, existing_file, replacing
from clip_base.storage.remote import (
    RemoteError,
    RemoteFile,
    address_is_http,
    address_of,
    name_of,
    open_remote,
    read_range,
)
from clip_base.storage.remote_cache import listing

TAR = ".tar"
TARS = (TAR, ".tar.gz", ".tgz")  # endings
_BLOCK = tarfile.BLOCKSIZE
_SKIPPED_AT_ONCE = 1 << 20  # bytes

Integers = npt.NDArray[np.int64]


def is_tar(name: str | Path) -> bool:
    """Whether a name ends as those of tars do, compressed ones too."""
    return str(name).lower().endswith(TARS)


def stem(name: str | Path) -> str:
    """Returns a tar's name without its folders and its ending: `data/0001.tar.gz` is `0001`."""
    last = str(name).rstrip("/").rpartition("/")[2]
    return next(
        (last[: -len(end)] for end in sorted(TARS, key=len)[::-1] if last.lower().endswith(end)), last
    )


@dataclass(frozen=True)
class Member:
    """A file inside an uncompressed tar.

    Attributes:
        tar: the archive, or what `Path` makes of its address.
        offset: of its first byte in the archive.
        size: in bytes.
    """

    tar: Path
    offset: int
    size: int

    def read_bytes(self) -> bytes:
        """Returns its content; InputError when the tar ends before it does."""
        address = address_of(self.tar)
        if address is not None:
            data = read_range(address, self.offset, self.size)
        else:
            with self.tar.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        if len(data) < self.size:
            raise InputError(f"{self} is truncated: it has {len(data)} of {self.size} bytes")
        return data

    def __str__(self) -> str:
        """Its name, read from the header before it: an index of names would fill the memory.

        At an address, which would be asked for it, the place.
        """
        address = address_of(self.tar)
        if address is not None:
            return f"{address} at byte {self.offset}"
        try:
            with self.tar.open("rb") as file:
                file.seek(self.offset - _BLOCK)
                header = tarfile.TarInfo.frombuf(file.read(_BLOCK), "utf-8", "surrogateescape")
            name = header.name.encode(errors="surrogateescape").decode(errors="replace")
            return f"{self.tar}/{name}"
        except (OSError, tarfile.HeaderError):
            return f"{self.tar} at byte {self.offset}"


@dataclass(frozen=True)
class TarIndex:
    """Where the files of a tar lie.

    Attributes:
        names: M names.
        offsets: [M] of the first byte.
        sizes: [M] in bytes.
        damage: why not all of the tar could be read; empty for a whole one.
    """

    names: list[str]
    offsets: Integers
    sizes: Integers
    damage: str = ""


def scan(path: Path) -> TarIndex:
    """Reads the headers of a tar.

    Raises:
        InputError: it is missing, compressed, or no tar.
    """
    names, offsets, sizes, end, damage = [], [], [], 0, ""
    try:
        with open_shard(path) as source, tarfile.open(fileobj=source, mode="r:") as tar:
            while True:
                member = tar.next()
                if member is None:
                    break
                tar.members = []  # type: ignore[attr-defined]  # or it would keep them all
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                if member.isfile():
                    names.append(member.name)
                    offsets.append(member.offset_data)
                    sizes.append(member.size)
    except InputError:
        raise
    except Exception as error:  # of damaged headers tarfile raises more than its own errors
        if not names:
            raise InputError(
                f"shard {path} cannot be read as an uncompressed tar: {error}; unpack compressed files first"
            ) from None
        # The last member is cut off; it is listed as unusable when it is drawn.
    with open_shard(path) as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(min(end, size))
        following = file.read(_BLOCK)
    if following.strip(b"\0"):  # tarfile takes a damaged header for the end
        damage = f"shard {path} is damaged at byte {end} of {size}: what follows cannot be read"
    return TarIndex(names, np.array(offsets, np.int64), np.array(sizes, np.int64), damage)


def read_index(path: Path, folder: str = "") -> TarIndex:
    """Returns the index of a tar, kept in `folder` from one run to the next when one is given."""
    if not folder:
        return scan(path)
    address = address_of(path)
    if address is not None:
        with RemoteFile(address) as file:
            version = int.from_bytes(hashlib.sha256(file.version.encode()).digest()[:7])
            stamp = np.array([file.size or 0, version], np.int64)
    else:
        status = existing(path, "shard").stat()
        stamp = np.array([status.st_size, status.st_mtime_ns], np.int64)
    digest = hashlib.sha256((address or str(path.absolute())).encode()).hexdigest()[:12]
    kept = Path(folder) / f"{path.stem}-{digest}.npz"
    if kept.exists():
        try:
            with np.load(kept) as held:
                if np.array_equal(held["stamp"], stamp):
                    names, damage = json.loads(held["names"].tobytes())
                    return TarIndex(names, held["offsets"], held["sizes"], damage)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            kept.unlink()  # damaged: it is rebuilt
    index = scan(path)
    text = np.frombuffer(json.dumps([index.names, index.damage]).encode(), np.uint8)
    with replacing(kept) as temporary, temporary.open("wb") as file:
        np.savez(file, stamp=stamp, names=text, offsets=index.offsets, sizes=index.sizes)
    return index


def expand(shards: str) -> list[Path]:
    """Returns the tars that `shards` names, see `addresses`, as `Member` and `scan` take them."""
    return [Path(name) for name in addresses(shards)]


def addresses(shards: str) -> list[str]:
    """Returns the tars that `shards` names: files, folders, patterns, addresses, with braces and `::`.

    Those at addresses are not looked for one by one.

    Raises:
        InputError: a local one does not exist, there are none, or one is of another kind.
    """
    found: list[str] = []
    for name in expand_urls(shards):
        if address_of(name) is not None:
            found += _tars_at(name)
        elif name.startswith("pipe:") or "://" in name:
            raise InputError(f"shard {name} cannot be read; give a path, or s3://, gs://, hf:// or https://")
        elif glob.has_magic(name) and not Path(name).exists():
            matching = sorted(filter(is_tar, glob.glob(name, recursive=True)), key=_order)
            if not matching:
                raise InputError(f"pattern {name!r} matches no tar ({', '.join(TARS)})")
            found += matching
        elif name:
            found += _tars_of(existing(name, "shard"))
    if not found:
        raise InputError(f"shards={shards!r} matches no file")
    return found


def _tars_of(path: Path) -> list[str]:
    """Returns a tar, or those in a folder, which may hold more: img2dataset leaves its statistics there."""
    if not path.is_dir():
        return [str(path)]
    tars = [str(file) for file in path.iterdir() if is_tar(file.name) and not file.name.startswith(".")]
    if not tars:
        raise InputError(f"folder {path} holds no .tar files; give a folder of them, or the tars")
    return sorted(tars, key=_order)


def _tars_at(address: str) -> list[str]:
    """Returns a tar at an address, or those in a folder there or that fit a pattern."""
    if is_tar(name_of(address)) and not glob.has_magic(address.partition("?")[0]):
        return [address]
    tars = sorted(filter(is_tar, listing(address)), key=_order)
    if not tars:
        raise InputError(f"{address} holds no tars ({', '.join(TARS)})")
    return tars


def _order(name: str) -> tuple[int, str]:
    return len(name), name  # 2.tar before 10.tar


def names_tars(images: str) -> bool:
    """Whether a text names tars: by their endings, or as a folder that holds them and no images."""
    names = [name for name in expand_urls(images) if name] if images else []
    if names and all(map(is_tar, names)):
        return True
    if len(names) == 1 and address_of(names[0]) is not None and not address_is_http(names[0]):
        return any(map(is_tar, listing(names[0])))
    if len(names) != 1 or not Path(names[0]).is_dir():
        return False
    entries = [entry for entry in Path(names[0]).iterdir() if not entry.name.startswith(".")]
    return any(is_tar(entry.name) for entry in entries) and not any(
        entry.is_dir() or entry.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp") for entry in entries
    )


class TarNames:
    """The files of an uncompressed tar by name; takes 24 bytes of memory per file.

    Args:
        tar: a local one. Of files of one name the last one counts, as when the tar is unpacked.

    Attributes:
        hashes: [M] of the names, sorted.

    Raises:
        InputError: it is missing, or compressed.
    """

    def __init__(self, tar: Path) -> None:
        self.tar = tar
        index = scan(tar)
        if index.damage:
            note(index.damage)
        hashes = np.array([name_hash(name) for name in index.names], np.uint64)
        order = np.argsort(hashes, kind="stable")
        self.hashes, self._offsets, self._sizes = hashes[order], index.offsets[order], index.sizes[order]

    def find(self, name: str) -> Member | None:
        """Returns the file of that name; None: there is none."""
        wanted = np.uint64(name_hash(name))
        place = int(np.searchsorted(self.hashes, wanted, side="right")) - 1
        if place < 0 or self.hashes[place] != wanted:
            return None
        return Member(self.tar, int(self._offsets[place]), int(self._sizes[place]))


def name_hash(name: str) -> int:
    """Returns 64 bits of a name's hash: of a billion names two are alike with a probability of 1 in 40."""
    name = name.removeprefix("./")
    return int.from_bytes(hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest())


def names_in(tar: Path) -> TarNames:
    """Returns the files of a tar by name; its headers are read once as long as it does not change."""
    status = existing_file(tar, "tar").stat()
    return _names_in(tar, (status.st_size, status.st_mtime_ns))


@functools.lru_cache(maxsize=4096)
def _names_in(tar: Path, stamp: tuple[int, int]) -> TarNames:
    return TarNames(tar)


def tar_of(path: Path) -> Path | None:
    """Returns the tar that a path `TAR/NAME` leads into; None: it leads into none."""
    return next((one for one in path.parents if is_tar(one.name) and one.is_file()), None)


def member_at(path: Path) -> Member | None:
    """Returns the file in a tar that `TAR/NAME` means; None: the path leads into no tar.

    Raises:
        InputError: the tar has no such file.
    """
    tar = tar_of(path)
    if tar is None:
        return None
    name = path.relative_to(tar).as_posix()
    member = names_in(tar).find(name)
    if member is None:
        raise InputError(f"tar {tar} has no file {name}")
    return member


@dataclass(frozen=True)
class Packed:
    """A file that was read from a tar.

    Attributes:
        name: in the tar.
        offset: of its first byte in the (uncompressed) tar.
        size: in bytes.
        data: its content; None: it was not wanted.
    """

    name: str
    offset: int
    size: int
    data: bytes | None


def stream(address: str, wanted: Callable[[str], bool]) -> Iterator[Packed]:
    """Reads a tar from its start to its end, gzipped or not, and yields its files.

    Args:
        address: the tar.
        wanted: whether the content of a file of this name is read.

    Raises:
        InputError: it is missing or no tar; or damaged or truncated, when what comes before was yielded.
    """
    with open_shard(address) as file:
        start = file.read(len(GZIPPED))
        whole = _Forward(file, start)
        source = _Forward(gzip.GzipFile(fileobj=cast(BinaryIO, whole))) if start == GZIPPED else whole
        yield from _files_of(source, address, wanted)


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Writes a member without what differs from run to run: its time, owner and mode are fixed."""
    header = tarfile.TarInfo(name)
    header.size = len(data)
    tar.addfile(header, io.BytesIO(data))


def open_shard(address: str | Path) -> BinaryIO:
    """Opens a tar for reading from its start; one at an address comes as it is read."""
    place = address_of(address)
    if place is not None:
        return open_remote(place)
    path = existing_file(address, "shard")
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(f"shard {path} cannot be read: {error.strerror}") from None


def _files_of(source: _Forward, address: str, wanted: Callable[[str], bool]) -> Iterator[Packed]:
    found = False
    try:
        with tarfile.open(fileobj=cast(BinaryIO, source), mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # or it would keep them all
                if member.isfile():
                    data = None
                    if wanted(member.name):
                        data = source.read(member.size)
                        if len(data) < member.size:
                            raise tarfile.ReadError(f"{member.name} is truncated")
                    yield Packed(member.name, member.offset_data, member.size, data)
                found = True
    except RemoteError:  # no damage: what comes next may be read another time
        raise
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
        if not found:
            raise InputError(f"shard {address} cannot be read as a tar: {error}") from None
        raise InputError(f"shard {address} is damaged: {error}; what follows cannot be read") from None
    if not source.last:
        raise InputError(
            f"shard {address} ends at byte {source.place} without a tar's end: was it truncated?"
        )
    if source.last.strip(b"\0"):  # tarfile takes a damaged header for the end
        raise InputError(f"shard {address} is damaged at byte {source.place}: what follows cannot be read")


class _Forward:
    """A stream that is read forwards, as tarfile needs it.

    Args:
        file: what is read.
        start: what was read of it already.

    Attributes:
        place: bytes that are behind.
        last: what was read last.
    """

    def __init__(self, file: BinaryIO | gzip.GzipFile, start: bytes = b"") -> None:
        self.file, self._start, self.place, self.last = file, start, 0, b""

    def read(self, size: int = -1) -> bytes:
        """Returns the next bytes; fewer only at the end."""
        parts = [self._start[:size] if size >= 0 else self._start]
        self._start = self._start[len(parts[0]) :]
        left = size - len(parts[0])
        while left and (part := self.file.read(left)):
            parts.append(part)
            left -= len(part)
        self.last = b"".join(parts)
        self.place += len(self.last)
        return self.last

    def tell(self) -> int:
        """Returns how many bytes are behind."""
        return self.place

    def seek(self, place: int, whence: int = io.SEEK_SET) -> int:
        """Skips to a later place."""
        assert whence == io.SEEK_SET
        if place < self.place:
            raise OSError("a stream is read forwards only")
        while self.place < place and self.read(min(place - self.place, _SKIPPED_AT_ONCE)):
            pass
        return self.place
