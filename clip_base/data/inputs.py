"""What a source of pairs reads: its files, for runs that resume and for processes on other machines."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from clip_base.jobs.run import files_of
from clip_base.runtime.errors import InputError
from clip_base.storage.files import absolute_path
from clip_base.storage.hashing import text_hash
from clip_base.storage.tars import addresses, stem

WEBDATASET = "webdataset"


def source_inputs(spec: dict[str, Any]) -> dict[str, Path | str]:
    """Returns what decides a source's pairs besides its options: its files, and tars by their size."""
    if spec["name"] == WEBDATASET:
        return {"input_tars": text_hash(_stamp(tar) for tar in addresses(spec["shards"]))}
    if "captions" in spec and Path(str(spec["captions"])).is_file():
        return {"captions": Path(spec["captions"])}
    if "file" in spec and Path(str(spec["file"])).is_dir():  # of Parquet tables
        files = sorted(Path(spec["file"]).rglob("*.parquet"))
        return {"source.file": text_hash(_stamp(str(file)) for file in files)}
    holder = type("Holder", (), {"source": {key: value for key, value in spec.items() if key != "name"}})
    return files_of(holder, "source")


def _stamp(tar: str) -> str:
    return f"{tar} {os.stat(tar).st_size if os.path.exists(tar) else ''}"


def absolute(spec: dict[str, Any]) -> dict[str, Any]:
    """Returns a source's options with absolute paths: processes on other machines begin in other folders."""
    found = dict(spec)
    if spec["name"] == WEBDATASET:
        found["shards"] = "::".join(absolute_path(tar) for tar in addresses(str(spec["shards"])))
        return found
    for key, value in spec.items():
        if key != "name" and isinstance(value, str) and value and os.path.exists(value):
            found[key] = str(Path(value).absolute())
    return found


def source_root(spec: dict[str, Any]) -> str:
    """Returns what a source's file names are relative to: a folder, or tars; "": they are absolute."""
    if spec["name"] == WEBDATASET:
        return str(spec["shards"])
    root = spec.get("images") or spec.get("folder")
    if not root and spec.get("file"):
        file = Path(str(spec["file"]))
        root = file if file.is_dir() else file.parent
    return str(root or "") if isinstance(root, str | Path) else ""


def unique_stems(tars: Sequence[str]) -> list[str]:
    """Returns a name for each tar: its own without the ending, with as many folders as tell them apart."""
    names = told_apart(tars, lambda parts: "-".join([*parts[:-1], stem(parts[-1])]).replace("/", ""))
    if names is None:
        twice = Counter(tars).most_common(1)[0][0]
        raise InputError(f"tar {twice} is given twice; give each once")
    return names


def told_apart(paths: Sequence[str], name: Callable[[tuple[str, ...]], str]) -> list[str] | None:
    """Returns names of paths made of their last parts, of as many as it takes; None: they stay alike."""
    parts = [PurePosixPath(path.replace("\\", "/")).parts for path in paths]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = [name(one[-depth:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return None
