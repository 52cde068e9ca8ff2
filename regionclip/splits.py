"""Base categories, of which boxes are seen in training, and novel ones, which only words describe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import zip_longest
from pathlib import Path

from clip_base.errors import InputError
from clip_base.files import existing, read_json
from clip_base.plugins import nearest
from regionclip.class_lists import read_classes

LVIS = "lvis"
# Bansal et al. (arXiv 1804.04340, section 5) chose the 48 and 17 of COCO's 80 categories that everybody
# reports on.
PUBLISHED = {"coco": ("coco_base.txt", "coco_novel.txt")}


@dataclass(frozen=True)
class Split:
    """Which categories are base and which are novel, by name. Categories in neither take no part.

    Attributes:
        base: names whose boxes training may see.
        novel: names whose boxes it must never see.
    """

    base: tuple[str, ...]
    novel: tuple[str, ...]

    def __post_init__(self) -> None:
        names = self.base + self.novel
        if not self.base:
            raise InputError("a split needs at least one base category")
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            both = sorted(set(self.base) & set(self.novel))
            where = "both base and novel" if both else "listed more than once"
            raise InputError(
                f"split: {', '.join(map(repr, both or repeated))} is {where}; each name may stand once"
            )

    @property
    def all(self) -> tuple[str, ...]:
        """Base names, then novel ones."""
        return self.base + self.novel

    def competing(self, part: str) -> tuple[str, ...]:
        """Returns the names of a part: "all", "base" or "novel"."""
        return {"all": self.all, "base": self.base, "novel": self.novel}[part]

    def is_novel(self, names: Sequence[str]) -> list[bool]:
        """Returns for each name whether it is novel."""
        novel = set(self.novel)
        return [name in novel for name in names]


def load_split(name_or_path: str | Path, categories: Sequence[str], frequencies: Sequence[str] = ()) -> Split:
    """Returns a published split or one from files.

    Args:
        name_or_path: "coco" (48 base and 17 novel); "lvis" (frequent and common categories are base, rare
            ones novel: LVIS v1 has 866 and 337; ViLD, arXiv 2104.13921, section 4.1); a JSON file
            `{"base": [names], "novel": [names]}`; or two class lists "BASE.txt,NOVEL.txt", a name a line.
        categories: the names in the annotations, in which every name of the split must occur. A name that
            is written with spaces means the category with underscores, as LVIS writes its names.
        frequencies: LVIS's `frequency` of each category: "f", "c" or "r".

    Raises:
        InputError: no such split, a malformed file, or names that the annotations do not have.
    """
    given = str(name_or_path)
    if given == LVIS:
        return _by_frequency(categories, frequencies)
    if given in PUBLISHED:
        base, novel = (_packaged_names(file) for file in PUBLISHED[given])
    elif given.count(",") == 1:
        base, novel = (
            tuple(synonyms[0] for synonyms in read_classes(str(existing(file.strip(), "class list"))))
            for file in given.split(",")
        )
    elif not given.endswith(".json") and not Path(given).is_file():
        known = ", ".join((*PUBLISHED, LVIS))
        raise InputError(
            f"there is no split {given!r}; give {known}, a JSON file "
            '{"base": [names], "novel": [names]}, or two class lists BASE.txt,NOVEL.txt'
        )
    else:
        base, novel = _read(Path(given))
    written = {name.replace("_", " "): name for name in categories} | {name: name for name in categories}
    split = Split(tuple(written.get(name, name) for name in base), tuple(written.get(n, n) for n in novel))
    missing = [name for name in split.all if name not in written]
    if missing:
        other_data = len(missing) > 1 and len(categories) >= 200  # then a list of all names is no help
        hint = "is it the split of another dataset?" if other_data else nearest(missing[0], list(categories))
        raise InputError(
            f"split {given}: {len(missing)} of its {len(split.all)} names are not among the "
            f"annotations' {len(categories)} categories: {_some(missing)}; {hint}"
        )
    return split


def _by_frequency(categories: Sequence[str], frequencies: Sequence[str]) -> Split:
    unknown = [
        name for name, one in zip_longest(categories, frequencies, fillvalue="") if one not in (*"fcr",)
    ]
    if unknown:
        raise InputError(
            f"split {LVIS} goes by the categories' `frequency` in the annotations (f, c: base; r: novel); "
            f"{len(unknown)} of {len(categories)} categories have none, first {unknown[0]!r}; "
            "give LVIS's own annotations, or a file with base and novel names"
        )
    pairs = list(zip(categories, frequencies, strict=True))
    return Split(
        tuple(name for name, one in pairs if one != "r"), tuple(name for name, one in pairs if one == "r")
    )


def _packaged_names(file: str) -> tuple[str, ...]:
    text = (files("regionclip") / "data_files" / file).read_text(encoding="utf-8")
    lines = (line.strip() for line in text.splitlines())
    return tuple(line for line in lines if line and not line.startswith("#"))


def _read(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    content = read_json(path, "split file")
    lists = [content.get(key) if isinstance(content, dict) else None for key in ("base", "novel")]
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists):
        raise InputError(f'split file {path} must hold {{"base": [names], "novel": [names]}}')
    base, novel = lists
    return tuple(base or ()), tuple(novel or ())


def _some(names: Sequence[str], limit: int = 5) -> str:
    shown = ", ".join(map(repr, names[:limit]))
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
