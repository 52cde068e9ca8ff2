"""Hashes of what a run reads, by content: an equal hash means the same bytes, wherever they are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from clip_base.runtime.announce import announced
from clip_base.storage.files import existing
from clip_base.storage.safetensors_files import tensors_hash


def content_hash(path: str | Path) -> str:
    """Returns the sha256 of a file, or of the names and contents of a folder's files, in hex.

    Of a safetensors file the tensors and the metadata count, see `tensors_hash`, of others the bytes. A
    folder is one of weights in transformers' form: its files count, folders in it do not.

    Raises:
        InputError: the path does not exist.
    """
    path = existing(path)
    if path.is_file():
        with announced(f"reading {path}"):
            return tensors_hash(path) or file_hash(path)
    lines = [f"{file.name} {content_hash(file)}" for file in sorted(path.iterdir()) if file.is_file()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """Returns the sha256 of a file's bytes, in hex, as publishers name it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_hash(lines: Iterable[object]) -> str:
    """Returns the sha256 of some things' texts in their order, such as the paths that a run reads."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{line}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
