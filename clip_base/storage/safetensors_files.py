"""Writing safetensors so that equal tensors and metadata give equal bytes, and hashing them by content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

LENGTH = 8  # bytes at the file's beginning: the header's length, little-endian
LIMIT = 100_000_000  # bytes of a header, as in the safetensors library
METADATA = "__metadata__"
_BLOCK = 1 << 22  # bytes


def sort_metadata(path: Path) -> None:
    """Sorts the metadata of a safetensors file, in place.

    The library writes it in a random order; the tensors' order and bytes are always the same.
    """
    with path.open("r+b") as file:
        header = read_header(file)
        assert header is not None, f"{path} was not written by safetensors"
        size = file.tell() - LENGTH
        ordered = {METADATA: dict(sorted(header[METADATA].items()))} if METADATA in header else {}
        ordered |= {name: entry for name, entry in header.items() if name != METADATA}
        text = json.dumps(ordered, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= size, f"the header of {path} grew from {size} to {len(text)} bytes"
        file.seek(LENGTH)
        file.write(text.ljust(size))  # the format pads with spaces, too


def read_header(file: BinaryIO) -> dict[str, Any] | None:
    """Reads the header at a file's beginning; None when it is no safetensors file.

    The file is then at the first byte of the tensors.
    """
    size = int.from_bytes(file.read(LENGTH), "little")
    if not 2 <= size <= LIMIT:
        return None
    raw = file.read(size)
    if len(raw) < size or not raw.startswith(b"{"):
        return None
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return header if isinstance(header, dict) else None


def tensors_hash(path: Path) -> str | None:
    """Returns a sha256 over the metadata and the tensors of a safetensors file, in hex.

    It depends on neither the order nor the place of anything in the file, so that weights that were saved
    again are the same weights. None: the file is no whole safetensors file.
    """
    with path.open("rb") as file:
        header = read_header(file)
        if header is None:
            return None
        start, size = file.tell(), path.stat().st_size
        metadata: Mapping[str, Any] = header.pop(METADATA, None) or {}
        digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
        last = 0
        for name, entry in sorted(header.items()):
            try:
                begin, end = entry["data_offsets"]
                digest.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
                if not 0 <= begin <= end <= size - start:
                    return None
            except (TypeError, KeyError, ValueError):
                return None
            last = max(last, end)
            file.seek(start + begin)
            for block in range(begin, end, _BLOCK):
                digest.update(file.read(min(_BLOCK, end - block)))
    return digest.hexdigest() if start + last == size else None
