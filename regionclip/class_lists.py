"""Class lists as people give them: typed, by a published list's name, or in a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clip_base.errors import InputError
from clip_base.files import existing, read_json, read_text

DATA_FILES = Path(__file__).parent / "data_files"
# Class lists that come with the project, by the name one types.
CLASS_LISTS = {
    "coco": ("coco80.txt",),
    "coco80": ("coco80.txt",),
    "coco65": ("coco_base.txt", "coco_novel.txt"),
    "coco_base": ("coco_base.txt",),
    "coco_novel": ("coco_novel.txt",),
    "lvis": ("lvis.txt",),
}
_FILE_ENDINGS = {".txt", ".json", ".csv", ".tsv", ".jsonl", ".yaml", ".names", ".npy", ".pth", ".safetensors"}


def parse_names(text: str) -> list[str]:
    """Returns the names of a vocabulary as a user types it.

    Args:
        text: "a, b, c"; a class list's name ("coco": COCO's 80 names in category order, "coco65": 48 base,
            then 17 novel ones, "coco_base", "coco_novel", "lvis": LVIS's 1,203 in category order); or a file,
            see `read_classes`.

    Raises:
        InputError: a file that does not exist or holds no names, no name, repeated names.
    """
    names = [synonyms[0] for synonyms in read_classes(text)]
    check_names(names)
    return names


def read_classes(text: str) -> list[tuple[str, ...]]:
    """Returns (name, its synonyms…) for each class of a list as a user types it, see `parse_names`.

    A text file holds one class a line, synonyms after it behind commas; `#` begins a comment. A JSON file
    holds a list of names, LVIS's categories (name and synonyms), or COCO annotations with `categories`.
    LVIS's underscores become spaces.
    """
    if text in CLASS_LISTS:
        return [(name,) for file in CLASS_LISTS[text] for name in _lines(DATA_FILES / file)]
    path = Path(text)
    looks_like_file = "," not in text and (
        path.suffix.lower() in _FILE_ENDINGS or "/" in text or "\\" in text
    )
    if not looks_like_file:
        return [(name.strip(),) for name in text.split(",") if name.strip()]
    existing(path, "class list")
    if path.suffix == ".json":
        classes = [_class_of(entry, path) for entry in _entries(path)]
    else:
        lines = ([part.strip() for part in line.split(",")] for line in _lines(path))
        classes = [tuple(part for part in line if part) for line in lines]
    classes = [entry for entry in classes if entry]
    if not classes:
        raise InputError(f"class list {path} holds no names; write one a line")
    return classes


def check_names(names: Sequence[str]) -> None:
    """Raises an InputError unless there are names, none empty and none twice."""
    if not names:
        raise InputError('a vocabulary needs at least one name, such as "cat, dog"')
    if not all(name.strip() for name in names):
        raise InputError("a vocabulary's names must not be empty")
    if len(set(names)) < len(names):
        seen: set[str] = set()
        twice = sorted({name for name in names if name in seen or seen.add(name)})  # type: ignore[func-returns-value]
        shown = ", ".join(map(repr, twice[:5])) + (f" and {len(twice) - 5} more" if len(twice) > 5 else "")
        raise InputError(f"a vocabulary's names must differ, {shown} stands there more than once")


def _entries(path: Path) -> list[Any]:
    loaded = read_json(path, "class list")
    entries = loaded.get("categories") if isinstance(loaded, dict) else loaded
    if not isinstance(entries, list):
        raise InputError(f"class list {path} must be a list of names or have `categories`")
    # COCO and LVIS number their categories; the number is the order that embeddings come in.
    if all(isinstance(entry, dict) and isinstance(entry.get("id"), int) for entry in entries):
        return sorted(entries, key=lambda entry: int(entry["id"]))
    return entries


def _class_of(entry: Any, path: Path) -> tuple[str, ...]:
    if isinstance(entry, str):
        return (entry,)
    if isinstance(entry, dict) and isinstance(entry.get("name"), str):
        words = [entry["name"], *map(str, entry.get("synonyms") or ())]
        return tuple(dict.fromkeys(word.replace("_", " ") for word in words))
    raise InputError(f"class list {path}: {str(entry)[:60]!r} is neither a name nor a category with a name")


def _lines(path: Path) -> Iterator[str]:
    lines = (line.partition("#")[0].strip() for line in read_text(path, "class list").splitlines())
    return (line for line in lines if line)
