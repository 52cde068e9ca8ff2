"""Datasets that are in no image files, written once as tars in CLIP_benchmark's layout.

So they are read as any other dataset: with bounded memory, and with features that are kept.
"""

from __future__ import annotations

import inspect
import io
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torchvision.datasets

from clip_base.jobs.plugins import did_you_mean
from clip_base.runtime.errors import InputError, quote, shortened
from clip_base.runtime.progress import track
from clip_base.storage.files import existing, make_folder, parse_json, read_text, replacing, write_text
from clip_base.storage.parquet_files import open_parquet
from clip_base.storage.tars import add_member

_DONE = "packed"
_IMAGES = ("image", "img", "picture")
_LABELS = ("label", "labels", "fine_label", "class", "target")
Labeled = Iterable[tuple[bytes, str, int]]  # an encoded image, its extension, its label


def pack(folder: Path, stamp: str, names: Iterable[str], parts: Mapping[str, Labeled]) -> Path:
    """Writes a dataset as tars; returns its folder.

    Args:
        folder: where to.
        stamp: what it is made of, see `_is_packed`.
        names: of the classes.
        parts: `train` and `test`, or one of them.
    """
    for part, examples in parts.items():
        path = make_folder(folder / part) / "0.tar"
        with replacing(path) as temporary, tarfile.open(temporary, "w") as tar:
            for number, (data, extension, label) in enumerate(track(examples, f"packing {part} images")):
                for ending, content in ((extension, data), ("cls", str(label).encode())):
                    add_member(tar, f"{number:08d}.{ending}", content)
    write_text(folder / "classnames.txt", "".join(f"{name}\n" for name in names))
    write_text(folder / _DONE, stamp)
    return folder


def _is_packed(folder: Path, stamp: str) -> bool:
    """Whether tars made of just this are there."""
    done = folder / _DONE
    return done.exists() and read_text(done, "stamp") == stamp


def pack_torchvision(name: str, root: str, folder: Path) -> Path:
    """Writes a dataset of torchvision as tars.

    Raises:
        InputError: torchvision has no such dataset, it is not in `root`, or it is none of classes.
    """
    known = [one for one in torchvision.datasets.__all__ if one != "FakeData"]
    if name not in known:
        raise InputError(f"torchvision has no dataset {name!r}; {did_you_mean(name, known)}")
    if not root:
        raise InputError(f"torchvision:{name} needs its folder: torchvision:{name}@DIR")
    stamp = f"torchvision {name} {Path(root).absolute()}"
    if _is_packed(folder, stamp):
        return folder
    make = getattr(torchvision.datasets, name)
    options = inspect.signature(make).parameters
    parts: dict[str, Any] = {}
    for part, splits in {"train": ("train", "trainval"), "test": ("test", "val")}.items():
        try:
            parts[part] = _split(make, options, str(existing(root, "folder")), part, splits)
        except InputError:
            raise
        except (RuntimeError, OSError, ValueError, TypeError) as error:
            reason = shortened(" ".join(str(error).split()), 150)
            raise InputError(
                f"torchvision:{name} cannot be read from {root} ({reason}); download it there by torchvision"
            ) from None
    names = getattr(parts["test"], "classes", None)
    if names is None or not isinstance(parts["test"][0][1], int):
        raise InputError(f"torchvision:{name} is no dataset of images with one class each")
    names = [" ".join(one) if isinstance(one, tuple) else str(one) for one in names]
    return pack(folder, stamp, names, {part: _encoded(dataset) for part, dataset in parts.items()})


def _split(make: Any, options: Any, root: str, part: str, splits: tuple[str, ...]) -> Any:
    if "train" in options:
        return make(root, train=part == "train")
    if "split" not in options:
        raise InputError(f"torchvision's {make.__name__} has no parts for training and test")
    failed: Exception | None = None
    for split in splits:
        try:
            return make(root, split=split)
        except ValueError as error:  # it has no such split
            failed = error
    assert failed is not None
    raise failed


def _encoded(dataset: Any) -> Iterator[tuple[bytes, str, int]]:
    for number in range(len(dataset)):
        image, label = dataset[number]
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        yield buffer.getvalue(), "png", int(label)


def pack_parquet(place: Path, folder: Path) -> Path:
    """Writes Parquet files as the hub stores image datasets as tars.

    A file's part is what its name begins with: `train-00000-of-00002.parquet`, `test.parquet`, or the folder
    that it is in.

    Raises:
        InputError: there is no column of images, or none of labels.
    """
    files = sorted(place.rglob("*.parquet")) if place.is_dir() else [place]
    stamp = "".join(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}\n" for file in files)
    if _is_packed(folder, stamp):
        return folder
    parts: dict[str, list[Path]] = {}
    for file in files:
        parts.setdefault(_part(file, place), []).append(file)
    if "test" not in parts:
        if len(parts) > 1 or "train" in parts:
            raise InputError(f"dataset {place} has only a part for training; it needs test-*.parquet")
        parts = {"test": files}
    image, label, names = _columns(files[0])
    packed = {
        part: _rows(own, image, label, names) for part, own in parts.items() if part in ("train", "test")
    }
    return pack(folder, stamp, names, packed)


def _part(file: Path, root: Path) -> str:
    inside = file.relative_to(root).parts if root.is_dir() else (file.name,)
    for text in reversed(inside):
        for part, words in {"train": ("train",), "test": ("test", "val")}.items():
            if text.lower().startswith(words):
                return part
    return ""


def _columns(file: Path) -> tuple[str, str, list[str]]:
    """Returns the columns of images and of labels, and the names of the classes in their order."""
    with open_parquet(file, "dataset") as opened:
        schema = opened.schema_arrow
        columns = schema.names
        features: dict[str, Any] = {}
        written = (schema.metadata or {}).get(b"huggingface", b"{}").decode(errors="replace")
        about = parse_json(written, f"the metadata `huggingface` of {file}", one_line=True)
        features = about.get("info", {}).get("features", {}) if isinstance(about, dict) else {}
        named = {
            column: feature["names"]
            for column, feature in features.items()
            if isinstance(feature, dict) and isinstance(feature.get("names"), list)
        }
        image = next((one for one in _IMAGES if one in columns), None)
        label = next((one for one in (*_LABELS, *named) if one in columns and one in named), None)
        label = label or next((one for one in _LABELS if one in columns), None)
        if image is None or label is None:
            lacking = "images" if image is None else "labels"
            raise InputError(
                f"dataset {file} has no column of {lacking}; it has {shortened(', '.join(columns))}, and "
                f"{', '.join(_IMAGES if image is None else _LABELS)} are looked for"
            )
        if label in named:
            return image, label, [str(name) for name in named[label]]
        values = sorted({value for value in opened.read([label]).column(0).to_pylist() if value is not None})
        if values and not all(isinstance(value, str) for value in values):
            raise InputError(
                f"dataset {file} does not say what its labels {quote(values[:3])} are called; store it with "
                "the features of Hugging Face's datasets, or labels as texts"
            )
        return image, label, values


def _rows(files: list[Path], image: str, label: str, names: list[str]) -> Iterator[tuple[bytes, str, int]]:
    place = {name: number for number, name in enumerate(names)}
    for file in files:
        with open_parquet(file, "dataset") as opened:
            for batch in opened.iter_batches(256, columns=[image, label]):
                for cell, value in zip(batch[image].to_pylist(), batch[label].to_pylist(), strict=True):
                    number = place.get(value, -1) if isinstance(value, str) else value
                    if number is None or not 0 <= number < len(names):
                        raise InputError(
                            f"dataset {file} has the label {quote(value)}, of {len(names)} classes"
                        )
                    data = cell.get("bytes") if isinstance(cell, dict) else cell
                    yield data or b"", _extension(data or b""), number


def _extension(data: bytes) -> str:
    """Returns the extension of an encoded image; what is none is found out when it is decoded."""
    if data.startswith(b"\x89PNG"):
        return "png"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else "jpg"
