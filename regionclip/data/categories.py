"""Class lists: typed, named (coco, lvis) or in a file; splits of base and novel categories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import zip_longest
from pathlib import Path

from clip_base.jobs.plugins import did_you_mean
from clip_base.runtime.errors import InputError, quote
from clip_base.storage.files import existing, is_file, read_json
from clip_base.storage.tables import CLASS_FILES, read_class_list

DATA_FILES = Path(__file__).parents[1] / "data_files"
# Class lists that come with the project, by the name one types.
CLASS_LISTS = {
    "coco": ("coco80.txt",),
    "coco80": ("coco80.txt",),
    "coco65": ("coco_base.txt", "coco_novel.txt"),
    "coco_base": ("coco_base.txt",),
    "coco_novel": ("coco_novel.txt",),
    "lvis": ("lvis.txt",),
}
# Nobody means these as names: a list with one of them is a file.
_FILE_ENDINGS = {*CLASS_FILES, ".npy", ".pth", ".safetensors"}
LVIS = "lvis"
# Bansal et al. (arXiv 1804.04340, section 5) chose the 48 and 17 of COCO's 80 categories that everybody
# reports on.
PUBLISHED = {"coco": ("coco_base.txt", "coco_novel.txt")}


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


def parse_typed_names(text: str, max_names: int, max_letters: int = 100) -> list[str]:
    """Returns the names that a stranger typed: separated by commas or lines, or a class list's name.

    Unlike for `parse_names` a path is a name like any other: no file is read.

    Raises:
        InputError: no name, repeated names, more than `max_names`, or one of more than `max_letters`.
    """
    if text.strip() in CLASS_LISTS:
        return parse_names(text.strip())
    names = [name.strip() for name in text.replace("\n", ",").split(",") if name.strip()]
    if len(names) > max_names:
        raise InputError(f"{len(names)} names are too many; give up to {max_names}")
    longest = max(names, key=len, default="")
    if len(longest) > max_letters:
        raise InputError(f"{longest[:30]!r}… has {len(longest)} letters; separate names by commas")
    check_names(names)
    return names


def read_classes(text: str) -> list[tuple[str, ...]]:
    """Returns (name, its synonyms…) for each class of a list as a user types it, see `parse_names`.

    Files are read by `clip_base.storage.tables.read_class_list`.
    """
    if text in CLASS_LISTS:
        return [entry for file in CLASS_LISTS[text] for entry in read_class_list(DATA_FILES / file)]
    looks_like_file = Path(text).suffix.lower() in _FILE_ENDINGS or "/" in text or "\\" in text
    if looks_like_file and ("," not in text or is_file(text)):
        return read_class_list(text)
    return [(name.strip(),) for name in text.split(",") if name.strip()]


def check_names(names: Sequence[str]) -> None:
    """Raises an InputError unless there are names, none empty and none twice."""
    if not names:
        raise InputError('a vocabulary needs at least one name, such as "cat, dog"')
    if not all(name.strip() for name in names):
        raise InputError("a vocabulary's names must not be empty")
    # The tokenizer reads them in lower case and with single spaces.
    spelled: dict[str, list[str]] = {}
    for name in names:
        spelled.setdefault(" ".join(name.lower().split()), []).append(name)
    twice = sorted(same for same in spelled.values() if len(same) > 1)
    if twice:
        ways = [" = ".join(quote(name, 40) for name in dict.fromkeys(same)) for same in twice]
        shown = ", ".join(ways[:5]) + (f" and {len(ways) - 5} more" if len(ways) > 5 else "")
        raise InputError(f"a vocabulary's names must differ, {shown} occurs more than once")


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
                f"split: {', '.join(map(repr, both or repeated))} is {where}; each name may occur once"
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
            `{"base": [names], "novel": [names]}`; two class lists "BASE.txt,NOVEL.txt", one name per line;
            or "": all categories are base.
        categories: the names in the annotations, in which every name of the split must occur. A name that
            is written with spaces means the category with underscores, as LVIS writes its names.
        frequencies: LVIS's `frequency` of each category: "f", "c" or "r".

    Raises:
        InputError: no such split, a malformed file, or names that the annotations do not have.
    """
    given = str(name_or_path)
    if not given:
        return Split(tuple(categories), ())
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
        hint = (
            "is it the split of another dataset?"
            if other_data
            else did_you_mean(missing[0], list(categories))
        )
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
    shown = ", ".join(map(quote, names[:limit]))
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
