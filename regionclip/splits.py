"""Base categories, of which boxes are seen in training, and novel ones, which only words describe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from clip_base.errors import InputError
from clip_base.files import read_json
from clip_base.plugins import nearest

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

    def is_novel(self, names: Sequence[str]) -> list[bool]:
        """Returns for each name whether it is novel."""
        novel = set(self.novel)
        return [name in novel for name in names]


def load_split(name_or_path: str | Path, categories: Sequence[str]) -> Split:
    """Returns a published split or one from a file.

    Args:
        name_or_path: "coco" (48 base and 17 novel), or a JSON file `{"base": [names], "novel": [names]}`.
        categories: the names in the annotations, in which every name of the split must occur.

    Raises:
        InputError: no such split, a malformed file, or names that the annotations do not have.
    """
    if str(name_or_path) in PUBLISHED:
        base, novel = (_packaged_names(file) for file in PUBLISHED[str(name_or_path)])
    elif not str(name_or_path).endswith(".json") and not Path(name_or_path).is_file():
        known = ", ".join(PUBLISHED)
        raise InputError(
            f"there is no split {str(name_or_path)!r}; give {known}, or a JSON file "
            '{"base": [names], "novel": [names]}'
        )
    else:
        base, novel = _read(Path(name_or_path))
    split = Split(base, novel)
    missing = [name for name in split.all if name not in set(categories)]
    if missing:
        other_data = len(missing) > 1 and len(categories) >= 200  # then a list of all names is no help
        hint = "is it the split of another dataset?" if other_data else nearest(missing[0], list(categories))
        raise InputError(
            f"split {name_or_path}: {len(missing)} of its {len(split.all)} names are not among the "
            f"annotations' {len(categories)} categories: {_some(missing)}; {hint}"
        )
    return split


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
