"""Class names and prompt templates of the 27 datasets of CLIP's paper (arXiv 2103.00020, table 9)."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

from clip_base.storage.files import read_json

_FILE = Path(__file__).parent.parent / "data_files" / "benchmark.json"
# What the paper measures; the first two are measured here, the others are told beside the accuracy.
METRICS = {
    "accuracy": "top1",
    "mean_per_class": "mean_per_class",
    "mean_of_top1_top5": "mean of top1 and top5",
    "map_11_point": "11-point mAP",
    "roc_auc": "ROC AUC",
}


@dataclass(frozen=True)
class PublishedNames:
    """How CLIP's paper classifies a dataset.

    Attributes:
        key: its name here.
        title: as the paper writes it.
        metric: which the paper reports, a key of METRICS.
        source: of the names and templates.
        classes: for each class one name or several, which count together.
        templates: prompts with `{}` for the name.
    """

    key: str
    title: str
    metric: str
    source: str
    classes: tuple[tuple[str, ...], ...]
    templates: tuple[str, ...]


@functools.cache
def published() -> dict[str, PublishedNames]:
    """Returns the 27 datasets by key."""
    found = {}
    for key, entry in read_json(_FILE, "published class names").items():
        classes = tuple((one,) if isinstance(one, str) else tuple(one) for one in entry["classes"])
        texts = (entry["title"], entry["metric"], entry["source"])
        found[key] = PublishedNames(key, *texts, classes, tuple(entry["templates"]))
    return found


@functools.cache
def _by_name() -> dict[str, str]:
    entries = read_json(_FILE, "published class names")
    return {
        plain(name): key
        for key, entry in entries.items()
        for name in (key, entry["title"], *entry["aliases"], f"vtab-{key}")
    }


def plain(name: str) -> str:
    """Returns a name's letters and digits, in lower case."""
    return re.sub(r"[\W_]", "", name.lower())


def published_of(name: str) -> PublishedNames | None:
    """Returns the dataset of a name, however it is written (`CIFAR-10`, `wds_cifar10`); None: no such one."""
    key = _by_name().get(plain(re.sub(r"^wds[_-]", "", name.lower())))
    return None if key is None else published()[key]
