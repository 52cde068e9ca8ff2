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

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from webdataset.tariterators import base_plus_ext

from clip_base.data.sources import SPLIT_LINES_HELP, Pair, Pairs, captions_in
from clip_base.jobs.config import REQUIRED, option
from clip_base.runtime.errors import InputError, note, shortened
from clip_base.runtime.progress import track
from clip_base.storage.files import ENCODING_HELP, decode_text, parse_json
from clip_base.storage.remote import RemoteError
from clip_base.storage.tars import Integers, Member, Packed, TarIndex, expand, read_index, stream

_NOWHERE = (0, -1)  # offset and size of what a record lacks
Held = TypeVar("Held")


@dataclass
class WebdatasetConfig:
    """Local webdataset shards."""

    shards: str = option(
        REQUIRED,
        "tars, a folder of them, or a pattern; braces, :: as in webdataset: data/{0000..0009}.tar::more.tar",
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
        places_of = zip(index.offsets.tolist(), index.sizes.tolist(), strict=True)
        records = [members for _, members in records_of(zip(index.names, places_of, strict=True))]
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
    """Returns the captions in one member, see `captions_of`."""
    try:
        data = member.read_bytes()
    except OSError as error:
        raise InputError(f"{member.tar} cannot be read: {error.strerror}") from None
    return captions_of(kind, data, str(member), config)


def captions_of(kind: str, data: bytes, where: str, config: WebdatasetConfig) -> list[str]:
    """Returns the captions in a member: those of a text, see `captions_in`, or a key's in a JSON object.

    Args:
        kind: one of `config.captions`.
        data: the content.
        where: the member, for messages.
        config: how texts are read.

    Raises:
        InputError: the content is no text, or no JSON object.
    """
    text = decode_text(data, f"text {where}", config.encoding)
    if not _in_json(kind):
        return list(captions_in(text, config.split_lines))
    content = parse_json(text, where)
    if not isinstance(content, dict):
        raise InputError(f"{where} has no captions: it is not a JSON object")
    found = content.get(kind.removeprefix("json."), [])
    texts = found if isinstance(found, list) else [found]
    return [" ".join(text.split()) for text in texts if isinstance(text, str) and text.strip()]


def records_of(members: Iterable[tuple[str, Held]]) -> Iterator[tuple[str, dict[str, Held]]]:
    """Groups a tar's members into records: those that follow each other and have one key.

    Args:
        members: (name, what it holds) in the order of the tar.

    Yields:
        The record's key, and extension in lower case -> what that member holds.
    """
    before, record = None, dict[str, Held]()
    for name, held in members:
        key, extension = base_plus_ext(name)
        if key is None or name.rpartition("/")[2].startswith("__"):
            continue  # no part of a record, by webdataset's convention
        if key != before or extension.lower() in record:
            if before is not None:
                yield before, record
            record = {}
        before = key
        record[extension.lower()] = held
    if before is not None:
        yield before, record


@dataclass(frozen=True)
class TarRecord:
    """A record that was read from its tar.

    Attributes:
        number: its place among the tar's records, from 0.
        key: webdataset's `__key__`.
        image: the encoded image; None when `fault` says why.
        captions: as they stand in its texts; may be empty.
        fault: why the record cannot be used; "" for one that can.
    """

    number: int
    key: str
    image: Packed | None
    captions: tuple[str, ...]
    fault: str = ""


def stream_records(tar: str, config: WebdatasetConfig, images: bool = True) -> Iterator[TarRecord]:
    """Reads the records of one tar, gzipped or not, from its start to its end.

    Args:
        tar: its address.
        config: which members are images and captions.
        images: whether the images' content is read.

    Yields:
        Every record. One that lacks an image or whose text is damaged says so; the last one says when the
        rest of the tar is lost.

    Raises:
        InputError: the tar is missing, or is none.
    """
    kinds = {"json" if _in_json(kind) else kind for kind in config.captions}

    def wanted(name: str) -> bool:
        extension = (base_plus_ext(name)[1] or "").lower()
        return extension in kinds or (images and extension in config.images)

    lost: list[str] = []

    def members() -> Iterator[tuple[str, Packed]]:
        begun = False
        try:
            for member in stream(tar, wanted):
                begun = True
                yield member.name, member
        except RemoteError:
            raise
        except InputError as error:
            if not begun:
                raise
            lost.append(str(error))

    number = -1
    for number, (key, record) in enumerate(records_of(members())):
        yield _tar_record(tar, number, key, record, config)
    if lost:
        yield TarRecord(number + 1, "", None, (), lost[0])


def _tar_record(
    tar: str, number: int, key: str, record: dict[str, Packed], config: WebdatasetConfig
) -> TarRecord:
    image = next((record[extension] for extension in config.images if extension in record), None)
    if image is None:
        there = shortened(", ".join(sorted(record)), 100)
        dotted = next((name for name in record if name.rpartition(".")[2] in config.images), "")
        hint = f" ({dotted!r} counts as the extension: rename images with a dot)" if dotted else ""
        reason = f"{tar}/{key}: the record has no image ({', '.join(config.images)}), only {there}{hint}"
        return TarRecord(number, key, None, (), reason)
    captions: list[str] = []
    for kind in config.captions:
        text = record.get("json" if _in_json(kind) else kind)
        if text is not None and text.data is not None:
            try:
                captions += captions_of(kind, text.data, f"{tar}/{text.name}", config)
            except InputError as error:
                return TarRecord(number, key, image, (), str(error))
    return TarRecord(number, key, image, tuple(captions))
