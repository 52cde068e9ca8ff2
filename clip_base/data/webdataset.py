"""Webdataset shards: tars of image-text records, read in any order.

Streaming a tar from its start, as webdataset's own pipeline does, makes the order depend on shuffle buffers
and on the number of workers, and a resumed run must read up to its place again. Local files can be sought in
instead: each tar's headers are read once, and from then on a record is where its bytes are. Shards so become
an ordinary source: a full shuffle, weights, and resuming at the next sample cost nothing more. What a list
of shards looks like (braces, `::`) and what a member's name says (key, extension) is webdataset's convention
and is left to that package. Records in fully random order want a local disk, best one without moving parts.
"""

# N records, C kinds of captions, M members of a tar
from __future__ import annotations

import hashlib
import json
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext

from clip_base.data.sources import SPLIT_LINES_HELP, Pair, Pairs, captions_in
from clip_base.jobs.config import REQUIRED, option
from clip_base.runtime.errors import InputError, note, shortened
from clip_base.runtime.progress import track
from clip_base.storage.files import ENCODING_HELP, decode_text, existing, existing_file, parse_json, replacing

_BLOCK = tarfile.BLOCKSIZE
_NOWHERE = (0, -1)  # offset and size of what a record lacks

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Member:
    """A file inside an uncompressed tar.

    Attributes:
        tar: the archive.
        offset: of its first byte in the archive.
        size: in bytes.
    """

    tar: Path
    offset: int
    size: int

    def read_bytes(self) -> bytes:
        """Returns its content; InputError when the tar ends before it does."""
        with self.tar.open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) < self.size:
            raise InputError(f"{self} is truncated: it has {len(data)} of {self.size} bytes")
        return data

    def __str__(self) -> str:
        """Its name, read from the header before it: an index of names would fill the memory."""
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
        with tarfile.open(existing_file(path, "shard"), "r:") as tar:
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
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(min(end, size))
        following = file.read(_BLOCK)
    if following.strip(b"\0"):  # tarfile takes a damaged header for the end
        damage = f"shard {path} is damaged at byte {end} of {size}: what follows cannot be read"
    return TarIndex(names, np.array(offsets, np.int64), np.array(sizes, np.int64), damage)


def read_index(path: Path, folder: str = "") -> TarIndex:
    """Returns the index of a tar, kept in `folder` from one run to the next when one is given."""
    if not folder:
        return scan(path)
    status = existing(path, "shard").stat()
    stamp = np.array([status.st_size, status.st_mtime_ns], np.int64)
    digest = hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:12]
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


@dataclass
class WebdatasetConfig:
    """Local webdataset shards."""

    shards: str = option(
        REQUIRED, "tars, or a folder of them; braces and :: as in webdataset: data/{0000..0009}.tar::more.tar"
    )
    images: list[str] = option(
        ["jpg", "jpeg", "png", "webp"], "extensions of a record's image, in order of preference"
    )
    captions: list[str] = option(
        ["txt"],
        "extensions of texts, or json.KEY for a text or a list of texts in a record's JSON; all count",
    )
    split_lines: bool = option(True, SPLIT_LINES_HELP)
    encoding: str = option("", ENCODING_HELP)
    index: str = option(
        "", "folder that caches the tar indices; empty: rebuilt in each run", runtime_only=True
    )

    def __post_init__(self) -> None:
        if not self.images or not self.captions:
            raise InputError("images and captions must each name at least one extension")


class WebdatasetSource:
    """Records of local webdataset tars, in any order."""

    def __init__(self, config: WebdatasetConfig) -> None:
        self.config = config

    def pairs(self) -> Pairs:
        """Returns one pair per record; texts are read when a pair is sampled."""
        return Records(expand(self.config.shards), self.config)


def expand(shards: str) -> list[Path]:
    """Returns the tars that `shards` names, in webdataset's notation.

    Raises:
        InputError: one of them is not a local file, or there are none.
    """
    names = [name for name in expand_urls(shards) if name]
    remote = next((name for name in names if name.startswith("pipe:") or "://" in name), None)
    if remote is not None:
        raise InputError(f"shard {remote} is not a local file; download it and give its path")
    if not names:
        raise InputError(f"shards={shards!r} matches no file")
    return [tar for name in names for tar in _tars_of(existing(name, "shard"))]


def _tars_of(path: Path) -> list[Path]:
    """Returns a tar, or those in a folder, which may hold more: img2dataset leaves its statistics there."""
    if not path.is_dir():
        return [path]
    tars = [file for file in path.iterdir() if file.suffix == ".tar" and not file.name.startswith(".")]
    if not tars:
        raise InputError(f"folder {path} holds no .tar files; give a folder of them, or the tars")
    return sorted(tars, key=lambda file: (len(file.name), file.name))  # 2.tar before 10.tar


class Records:
    """The records of several tars as pairs.

    Args:
        tars: the shards.
        config: which members are images and captions.

    Raises:
        InputError: no record has an image, or none a caption; the extensions that are there are named.
    """

    def __init__(self, tars: list[Path], config: WebdatasetConfig) -> None:
        self.tars, self.config = tars, config
        self.damage: dict[int, str] = {}  # record -> why the rest of its tar is lost
        self._dotted: list[str] = []  # extensions such as "v1.jpg" of records without image
        extensions: set[str] = set()
        tables: list[Integers] = []
        total = 0
        for number, tar in enumerate(track(tars, "indexing shards")):
            index = read_index(tar, config.index)
            places = self._places(index, extensions)
            if index.damage:
                self.damage[total + len(places)] = index.damage
                places.append([*_NOWHERE] * (1 + len(config.captions)))
            total += len(places)
            if places:
                tables.append(np.array([[number, *place] for place in places], np.int64))
        # [N, 1 + 2 + 2C]: tar, then offset and size of the image and of each caption
        empty = np.empty((0, 3 + 2 * len(config.captions)), np.int64)
        self._table: Integers = np.concatenate([empty, *tables])
        there = shortened(", ".join(sorted(extensions)) or "none", 300)
        if self._dotted:
            note(
                f"{tars[0]}{' …' if len(tars) > 1 else ''}: {len(self._dotted):,} images are not found, for "
                "their names have a dot: webdataset takes what follows the first dot, such as "
                f"{self._dotted[0]!r}, for the extension; rename them"
            )
        for what, wanted, sizes in (
            ("images", config.images, self._table[:, 2]),
            ("captions", config.captions, self._table[:, 4::2]),
        ):
            if not (sizes >= 0).any():
                raise InputError(
                    f"{tars[0]}{' …' if len(tars) > 1 else ''}: no record has {what} ({', '.join(wanted)}); "
                    f"set {what}= to some of the extensions there: {there}"
                )

    def _places(self, index: TarIndex, extensions: set[str]) -> list[list[int]]:
        """Returns offset and size of each record's image and captions; a record's members stand together."""
        records: list[dict[str, tuple[int, int]]] = []
        before = None
        for name, offset, size in zip(index.names, index.offsets.tolist(), index.sizes.tolist(), strict=True):
            key, extension = base_plus_ext(name)
            if key is None or name.rpartition("/")[2].startswith("__"):
                continue  # no part of a record, by webdataset's convention
            if key != before or extension.lower() in records[-1]:
                records.append({})
            before = key
            records[-1][extension.lower()] = (offset, size)
        kinds = ["json" if _in_json(caption) else caption for caption in self.config.captions]
        places = []
        for record in records:
            extensions.update(record)
            image = next((record[name] for name in self.config.images if name in record), _NOWHERE)
            if image is _NOWHERE:
                self._dotted += [name for name in record if name.rpartition(".")[2] in self.config.images]
            places.append([*image, *(value for kind in kinds for value in record.get(kind, _NOWHERE))])
        return places

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int, /) -> Pair:
        """Returns a record's image, not yet read, and its texts.

        Raises:
            InputError: the record lacks one of them or is damaged.
        """
        if index in self.damage:
            raise InputError(self.damage[index])
        number, *places = self._table[index].tolist()
        members = [Member(self.tars[number], *places[at : at + 2]) for at in range(0, len(places), 2)]
        image, texts = members[0], members[1:]
        there = next((member for member in members if member.size >= 0), None)
        where = there or f"{self.tars[number]}, record {index}"
        if image.size < 0:
            raise InputError(f"{where}: the record has no image ({', '.join(self.config.images)})")
        captions = [
            caption
            for kind, text in zip(self.config.captions, texts, strict=True)
            if text.size >= 0
            for caption in _captions(kind, text, self.config)
        ]
        if not captions:
            raise InputError(f"{where}: the record has no caption ({', '.join(self.config.captions)})")
        return Pair(image, tuple(captions))


def _in_json(kind: str) -> bool:
    return kind.startswith("json.")


def _captions(kind: str, member: Member, config: WebdatasetConfig) -> list[str]:
    """Returns the captions in one member: those of a text, see `captions_in`, or a key's in a JSON object."""
    try:
        data = member.read_bytes()
    except OSError as error:
        raise InputError(f"{member.tar} cannot be read: {error.strerror}") from None
    text = decode_text(data, f"text {member}", config.encoding)
    if not _in_json(kind):
        return list(captions_in(text, config.split_lines))
    content = parse_json(text, str(member))
    if not isinstance(content, dict):
        raise InputError(f"{member} has no captions: it is not a JSON object")
    found = content.get(kind.removeprefix("json."), [])
    texts = found if isinstance(found, list) else [found]
    return [" ".join(text.split()) for text in texts if isinstance(text, str) and text.strip()]
