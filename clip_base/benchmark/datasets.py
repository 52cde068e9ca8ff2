"""Datasets of a benchmark: what a path or a name gives, its classes with their prompts, its parts.

| entry | dataset |
|---|---|
| DIR | image folders: a subfolder per class, in DIR or in `train` and `test` (or `val`) of it |
| DIR | CLIP_benchmark's webdataset layout: tars in `train` and `test`, `classnames.txt`; or captions |
| DIR, FILE.parquet | Parquet as the hub stores image datasets: `train-*.parquet`, `test-*.parquet` |
| FILE.json@IMAGES | COCO's captions, for retrieval |
| torchvision:CIFAR10@DIR | a dataset of torchvision that is in DIR |

Before each may stand `NAME:`, by which the table calls it and the published names are found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clip_base.benchmark.packing import pack_parquet, pack_torchvision
from clip_base.benchmark.published import PublishedNames, plain, published_of
from clip_base.data.coco import read_captions
from clip_base.evaluation.datasets import (
    EvaluationImage,
    beside_tars,
    folder_images,
    shard_captions,
    tars_folder,
)
from clip_base.evaluation.prompts import read_templates
from clip_base.images.folders import subfolders
from clip_base.runtime.errors import InputError, note, shortened
from clip_base.storage.files import existing, read_text
from clip_base.storage.paths import image_in

TORCHVISION = "torchvision"
TESTS = ("test", "val", "validation", "valid")
Names = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class BenchmarkDataset:
    """A dataset of classes, or of captions.

    Attributes:
        name: in the table.
        test: the images that are measured.
        train: those of probes; empty: it has none.
        classes: for each class one name or several, which count together; empty: it has captions.
        templates: prompts with `{}` for a name.
        captions: of each test image.
        published: the names and the metric of the paper; None: it is none of its datasets.
    """

    name: str
    test: list[EvaluationImage]
    train: list[EvaluationImage] = field(default_factory=list)
    classes: Names = ()
    templates: tuple[str, ...] = ()
    captions: list[tuple[str, ...]] = field(default_factory=list)
    published: PublishedNames | None = None


def open_dataset(entry: str, packed: Path, templates: str) -> BenchmarkDataset:
    """Returns the dataset of an entry, see the module.

    Args:
        entry: as the user gave it.
        packed: a folder for tars of what is in no files.
        templates: for a dataset that has none of its own and no published ones, see `read_templates`.

    Raises:
        InputError: there is no such dataset, it is of no known kind, or a class has no images.
    """
    name, place = _named(entry)
    if place.startswith(f"{TORCHVISION}:"):
        which, _, root = place.removeprefix(f"{TORCHVISION}:").partition("@")
        name = name or which
        return _classified(name, pack_torchvision(which, root, packed / plain(name)), templates)
    if "@" in place:
        return _captioned(name or Path(place.partition("@")[0]).stem, place)
    folder = existing(place, "dataset")
    name = name or folder.stem
    if folder.suffix == ".parquet" or (folder.is_dir() and any(folder.rglob("*.parquet"))):
        return _classified(name, pack_parquet(folder, packed / plain(name)), templates)
    if not folder.is_dir():
        raise InputError(
            f"dataset {entry} is of no known kind; give a folder, a .parquet file, captions "
            "FILE.json@IMAGES, or torchvision:NAME@DIR"
        )
    kind = beside_tars(folder, "dataset_type.txt")
    if tars_folder(folder) is not None and kind.exists() and read_text(kind).strip() == "retrieval":
        examples, captions, skipped = shard_captions(folder)
        if skipped:
            note(f"{place}: {len(skipped):,} records have no caption and are left out")
        return BenchmarkDataset(name, examples, captions=captions)
    return _classified(name, folder, templates)


def _named(entry: str) -> tuple[str, str]:
    """Returns the name that stands before a colon, "" without one, and the rest."""
    before, colon, rest = entry.partition(":")
    if not colon or Path(entry).exists() or before == TORCHVISION or "/" in before or "\\" in before:
        return "", entry
    if not rest:
        raise InputError(f"dataset {entry!r} names no folder; give NAME:DIR")
    return before, rest


def _captioned(name: str, place: str) -> BenchmarkDataset:
    file, _, images = place.partition("@")
    captions, files = read_captions(existing(file, "captions file"))
    folder, where = existing(images, "images folder"), f"captions file {file}"
    keys = sorted(captions)
    if not keys:
        raise InputError(f"{where} holds no captions")
    examples = [EvaluationImage(image_in(folder, files[key], where), 0) for key in keys]
    return BenchmarkDataset(name, examples, captions=[tuple(captions[key]) for key in keys])


def _classified(name: str, folder: Path, templates: str) -> BenchmarkDataset:
    """Returns a dataset of classes in folders or tars."""
    test_folder, train_folder = _parts(folder)
    found, test = folder_images(str(test_folder))
    train: list[EvaluationImage] = []
    if train_folder is not None:
        names, train = folder_images(str(train_folder))
        if names != found:
            lacking = sorted(set(names) ^ set(found))[:3]
            raise InputError(
                f"dataset {name}: the classes of {train_folder} and {test_folder} differ, as in "
                f"{', '.join(lacking)}; each needs a subfolder in both"
            )
    for part, examples in (("test", test), ("train", train)):
        _require_all(name, part, found, examples)
    known = published_of(name)
    classes = _names(name, found, known)
    own = beside_tars(test_folder, "zeroshot_classification_templates.txt")
    if not own.exists():
        own = folder / own.name
    if own.exists():
        prompts: Sequence[str] = read_templates(str(own))
    else:
        prompts = known.templates if known is not None else read_templates(templates)
    return BenchmarkDataset(name, test, train, classes, tuple(prompts), published=known)


def _require_all(name: str, part: str, classes: Sequence[str], examples: Sequence[EvaluationImage]) -> None:
    """Raises an InputError when a class has no images; a part that is not there may have none."""
    if not examples:
        return
    present = {example.label for example in examples}
    lacking = [one for label, one in enumerate(classes) if label not in present]
    if lacking:
        raise InputError(
            f"dataset {name}: {len(lacking):,} of {len(classes):,} classes have no images in the {part} "
            f"part, such as {shortened(repr(lacking[0]))}; add images or remove the class"
        )


def _parts(folder: Path) -> tuple[Path, Path | None]:
    """Returns where the test images are, and the training images if there are some."""
    inner = {path.name.lower(): path for path in subfolders(folder)}
    test = next((inner[name] for name in TESTS if name in inner), None)
    if test is None:
        return folder, None
    return test, inner.get("train")


def _names(name: str, found: Sequence[str], known: PublishedNames | None) -> Names:
    """Returns the names to classify by: the published ones, in the order of the dataset's labels."""
    own = tuple((one,) for one in found)
    if known is None:
        return own
    if len(known.classes) != len(found):
        note(
            f"dataset {name} has {len(found)} classes, and {known.title} of the paper {len(known.classes)}: "
            "its own names are used, with the paper's prompts"
        )
        return own
    by_name = {plain(one): names for names in known.classes for one in names}
    if all(plain(one) in by_name for one in found):
        return tuple(by_name[plain(one)] for one in found)
    note(
        f"dataset {name}: the names of the paper are given to its classes by their order, {found[0]!r} is "
        f"{known.classes[0][0]!r} and {found[-1]!r} is {known.classes[-1][0]!r}; give the dataset another "
        "name if that is wrong"
    )
    return known.classes
