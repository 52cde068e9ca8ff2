"""`clip-base scenes`: generates a synthetic dataset of captioned images with exact boxes and masks, as COCO.

Left in `out`: `images/{train,val}/*.jpg`, `captions_{train,val}.json`, `instances_{train,val}.json`,
`split.json` (names of base and novel categories) and, last of all, `scenes.json` (the options, with the
automatic ones filled in). File names in the annotations are relative to `images`.

With `format=webdataset` the images are in `{train,val}-NNNN.tar` instead, each followed by a text with its
captions. File names in the annotations are then those of the tars' members.
"""

from __future__ import annotations

import functools
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from clip_base.data.coco import coco_entry
from clip_base.jobs.config import REQUIRED, option
from clip_base.jobs.everyday import everyday
from clip_base.jobs.run import RunFolder
from clip_base.runtime.errors import InputError
from clip_base.runtime.progress import Progress
from clip_base.runtime.workers import Report, cores, run
from clip_base.storage.files import make_folder, read_json, replacing, write_json
from clip_base.storage.tars import add_member
from clip_base.synthetic.captions import Seen, Style, describe
from clip_base.synthetic.painting import Painter, Recipe, Scene
from clip_base.synthetic.pictograms import ATTRIBUTES, TABLE, Category, with_variants
from clip_base.synthetic.splits import SPLITS_OF_CATEGORIES, balanced, long_tail, spread

SPLITS = ("train", "val")
DRAWING = 1
"""Raised when the same options begin to give other images or captions, so that worlds are not mixed."""

_CHUNK = 250
_BANK = len(SPLITS)


@everyday(
    "scenes out=world images=2000 seed=1",
    output="out images val_images size",
    quality="categories novel tail objects_max colors seed",
    speed="workers",
)
@dataclass
class ScenesConfig:
    """Options of `clip-base scenes`."""

    out: str = option(REQUIRED, "folder to write the dataset to", runtime_only=True)
    images: int = option(10_000, "number of training images")
    val_images: int = option(0, "number of validation images; 0: a tenth of images")
    seed: int = option(0, "determines every image and every word")
    size: int = option(128, "side of the square images, in pixels")
    categories: int = option(16, f"number of categories without their variants, up to {len(TABLE)}")
    attributes: list[str] = option(
        [],
        f"some of {', '.join(ATTRIBUTES)}: each adds a variant of every category, such as tall star beside "
        "star, which is a category of its own",
    )
    novel: int = option(0, "how many categories are novel; 0: a quarter")
    split: str = option(
        "spread",
        "which categories are novel: spread evenly over the list of categories, or balanced: drawn by seed "
        "so that base and novel ones are equally hard to tell apart",
        choices=SPLITS_OF_CATEGORIES,
    )
    tail: float = option(
        0.0,
        "how uneven categories are in training images: frequencies fall as 1 / rank^tail, ranks are drawn by "
        "seed; 0: equally frequent, as they always are in validation images",
    )
    objects_min: int = option(1, "minimum number of objects per image")
    objects_max: int = option(4, "maximum number of objects per image")
    object_min: float = option(0.2, "longest side of the smallest objects, as a share of the image's")
    object_max: float = option(0.5, "longest side of the largest objects, as a share of the image's")
    distractors: int = option(1, "maximum number of unnamed shapes per image")
    captions: int = option(3, "captions per image")
    colors: float = option(0.15, "share of the phrases with a color word, 0 to 1", renamed_from="colours")
    synonyms: float = option(
        0.0, "share of the phrases that use another noun than the category's name (plane, mug), 0 to 1"
    )
    mention: float = option(0.75, "probability that a caption names an object, 0 to 1; it always names one")
    quality: int = option(90, "JPEG quality, 1 to 100")
    format: str = option(
        "folder",
        "folder: images as files; webdataset: images and their captions in tars",
        choices=("folder", "webdataset"),
    )
    tar_images: int = option(1000, "format=webdataset: images per tar")
    workers: int = option(0, "processes; 0: one per core", runtime_only=True)

    def __post_init__(self) -> None:
        """Refuses values that cannot be drawn."""
        whole = {"images": 1, "val_images": 0, "seed": 0, "size": 32, "categories": 2, "novel": 0}
        whole |= {
            "objects_min": 1,
            "distractors": 0,
            "captions": 1,
            "quality": 1,
            "workers": 0,
            "tar_images": 1,
        }
        for name, least in whole.items():
            if getattr(self, name) < least:
                raise InputError(f"{name}={getattr(self, name)} is too small; give {least} or more")
        strange = [name for name in self.attributes if name not in ATTRIBUTES]
        if strange or len(set(self.attributes)) < len(self.attributes):
            raise InputError(
                f"attributes={self.attributes}: give each of {', '.join(ATTRIBUTES)} at most once"
            )
        names = self.categories * (1 + len(self.attributes))
        highest = {"categories": len(TABLE), "novel": names - 1, "quality": 100, "objects_max": 100}
        for name, most in highest.items():
            if getattr(self, name) > most:
                raise InputError(f"{name}={getattr(self, name)} is too large; give {most} or less")
        if self.objects_max < self.objects_min:
            raise InputError(f"objects_max={self.objects_max} is below objects_min={self.objects_min}")
        if not 0 < self.object_min <= self.object_max <= 0.65:
            raise InputError(
                f"object_min={self.object_min}, object_max={self.object_max}: "
                "give shares with 0 < object_min <= object_max <= 0.65"
            )
        if self.object_min * self.size < 10:
            raise InputError(
                f"object_min={self.object_min} of size={self.size} is under 10 pixels, too small to see"
            )
        if not 0 <= self.tail <= 5:
            raise InputError(f"tail={self.tail} must be between 0 and 5")
        for name in ("colors", "mention", "synonyms"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}={getattr(self, name)} must be between 0 and 1")


def generate(config: ScenesConfig) -> None:
    """Generates a synthetic dataset of captioned images; a stopped run resumes.

    Raises:
        InputError: `out` has another dataset, or one that another version of this job generated.
    """
    folder, finished = RunFolder(config.out, config, "scenes").path, _resolved(config)
    record = folder / "scenes.json"
    if record.exists():
        if read_json(record, "scene record") != finished:
            raise InputError(
                f"{record} was written by another version of this job; delete {folder} or give another out"
            )
        return
    parts = folder / ".parts"
    counts = {"train": config.images, "val": finished["val_images"]}
    chunk = config.tar_images if config.format == "webdataset" else _CHUNK  # a tar is written in one go
    tasks = [
        (split, start, min(start + chunk, counts[split]))
        for split in SPLITS
        for start in range(0, counts[split], chunk)
    ]
    for split in SPLITS if config.format == "folder" else ():
        make_folder(folder / "images" / split)
    _begin_parts(parts, finished)
    missing = [task for task in tasks if not _part(parts, task).exists()]
    total = sum(counts.values())
    done = total - sum(stop - start for _, start, stop in missing)
    with Progress("scenes", total, done) as progress:
        for drawn in _draw_all(config, missing):
            progress.advance(drawn)
    for split in SPLITS:
        _assemble(folder, split, [_part(parts, task) for task in tasks if task[0] == split], config)
    names, novel = [category.name for category in all_categories(config)], novel_names(config)
    split_names = {"base": [name for name in names if name not in novel], "novel": novel}
    write_json(folder / "split.json", split_names, indent=2)
    write_json(record, finished, indent=2)
    shutil.rmtree(parts)


def all_categories(config: ScenesConfig) -> tuple[Category, ...]:
    """Returns the dataset's categories, variants last, in the order of their ids."""
    return with_variants(TABLE[: config.categories], config.attributes)


def novel_names(config: ScenesConfig) -> list[str]:
    """Returns the novel ones of the dataset's categories, in the order of their ids."""
    names = [category.name for category in all_categories(config)]
    count = config.novel or max(1, len(names) // 4)
    return balanced(names, count, config.seed) if config.split == "balanced" else spread(names, count)


def _resolved(config: ScenesConfig) -> dict[str, Any]:
    """The options that determine the dataset, with the automatic ones filled in."""
    values = asdict(replace(config, val_images=config.val_images or max(1, config.images // 10)))
    values["novel"] = len(novel_names(config))
    return {"drawing": DRAWING} | {
        key: value for key, value in values.items() if key not in ("out", "workers")
    }


Task = tuple[str, int, int]


def _part(parts: Path, task: Task) -> Path:
    return parts / f"{task[0]}_{task[1]:09d}.json"


def _begin_parts(parts: Path, options: dict[str, Any]) -> None:
    """Keeps what a killed run of the same options finished; drops what another version of the drawing did."""
    mark = parts / "options.json"
    if mark.exists() and read_json(mark) == options:
        return
    shutil.rmtree(parts, ignore_errors=True)
    write_json(mark, options)


def _draw_all(config: ScenesConfig, tasks: list[Task]) -> Iterator[int]:
    """Draws the chunks, in this process or in several; yields how many scenes each finished one held."""
    threads = cv2.getNumThreads()
    try:
        workers = min(config.workers or cores(), max(len(tasks), 1))
        for _, drawn in run("local", functools.partial(_start_artist, config), tasks, workers):
            yield drawn
    finally:
        cv2.setNumThreads(threads)


def _start_artist(config: ScenesConfig) -> _Artist:
    cv2.setNumThreads(1)  # processes share the cores, not threads
    return _Artist(config)


class _Artist:
    """Draws chunks of scenes and writes their images and their share of the annotations."""

    def __init__(self, config: ScenesConfig) -> None:
        self.config, self.folder = config, Path(config.out)
        categories = all_categories(config)
        self.category_ids = {category: i + 1 for i, category in enumerate(categories)}
        recipe = Recipe(
            size=config.size,
            categories=categories,
            objects=(config.objects_min, config.objects_max),
            side=(config.object_min, config.object_max),
            distractors=config.distractors,
        )
        self.painter = Painter(recipe, (config.seed, _BANK))
        self.chances = long_tail(len(categories), config.tail, config.seed) if config.tail else None
        self.style = Style(config.mention, config.colors, config.synonyms)

    def __call__(self, task: Task, report: Report) -> int:
        """Draws scenes `start` to `stop` of a split; the part file comes last and says that they exist."""
        split, start, stop = task
        if self.config.format == "folder":
            part = self._draw(task, self._write)
        else:
            path = self.folder / f"{split}-{start // self.config.tar_images:04d}.tar"
            with replacing(path) as temporary, tarfile.open(temporary, "w") as tar:
                part = self._draw(task, functools.partial(_pack, tar))
        write_json(_part(self.folder / ".parts", task), part)
        return stop - start

    def _write(self, name: str, encoded: bytes, captions: list[str]) -> None:
        (self.folder / "images" / name).write_bytes(encoded)

    def _draw(self, task: Task, write: Callable[[str, bytes, list[str]], None]) -> dict[str, list[Any]]:
        """Draws scenes, hands their images to `write`, and returns their annotations."""
        split, start, stop = task
        images, instances, captions = [], [], []
        for index in range(start, stop):
            rng = np.random.default_rng([self.config.seed, SPLITS.index(split), index])
            scene = self.painter.scene(rng, self.chances if split == "train" else None)
            image_id = index + 1 + (self.config.images if split == "val" else 0)
            name = f"{split}/{image_id:012d}.jpg"
            _, encoded = cv2.imencode(".jpg", scene.pixels, [cv2.IMWRITE_JPEG_QUALITY, self.config.quality])
            size = self.config.size
            images.append({"id": image_id, "file_name": name, "width": size, "height": size})
            instances += self._annotations(scene, image_id)
            texts = self._captions(scene, self.config.captions, rng)
            captions += [{"image_id": image_id, "caption": text} for text in texts]
            write(name, encoded.tobytes(), texts)
        return {"images": images, "instances": instances, "captions": captions}

    def _annotations(self, scene: Scene, image_id: int) -> list[dict[str, Any]]:
        masks = np.stack([placed.mask for placed in scene.objects], axis=-1).view(np.uint8)
        rles = coco_mask.encode(np.asfortranarray(masks))
        return [
            coco_entry(
                image_id,
                self.category_ids[placed.category],
                placed.box,
                area=float(placed.mask.sum()),
                iscrowd=0,
                segmentation={"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")},
            )
            for placed, rle in zip(scene.objects, rles, strict=True)
        ]

    def _captions(self, scene: Scene, count: int, rng: np.random.Generator) -> list[str]:
        size = self.config.size
        objects = [
            Seen(
                placed.category,
                (placed.box[0] / size, placed.box[1] / size, placed.box[2] / size, placed.box[3] / size),
                placed.color,
                placed.behind,
            )
            for placed in scene.objects
        ]
        texts: list[str] = []
        while len(texts) < count:
            text = describe(objects, scene.backdrop, self.style, rng)
            if (
                text in texts and rng.random() < 0.9
            ):  # a repetition teaches nothing; say it otherwise if we can
                continue
            texts.append(text)
        return texts


def _pack(tar: tarfile.TarFile, name: str, encoded: bytes, captions: list[str]) -> None:
    """Adds an image and its captions to a tar, without what would differ from one run to the next."""
    text = "\n".join(captions).encode()
    for member, data in ((name, encoded), (str(Path(name).with_suffix(".txt")), text)):
        add_member(tar, member, data)


def _assemble(folder: Path, split: str, parts: list[Path], config: ScenesConfig) -> None:
    """Joins a split's parts, in order, into the two annotation files; ids count from 1."""
    images: list[Any] = []
    lists: dict[str, list[Any]] = {"instances": [], "captions": []}
    for path in parts:
        part = json.loads(path.read_text(encoding="utf-8"))
        images += part["images"]
        for kind, entries in lists.items():
            entries += part[kind]
    info = {"description": f"drawn scenes, {split}, seed {config.seed}", "version": str(DRAWING)}
    categories = [
        {"id": i + 1, "name": category.name, "supercategory": category.group}
        for i, category in enumerate(all_categories(config))
    ]
    for kind, entries in lists.items():
        numbered = [{"id": i + 1} | entry for i, entry in enumerate(entries)]
        whole: dict[str, Any] = {"info": info, "licenses": [], "images": images, "annotations": numbered}
        if kind == "instances":
            whole["categories"] = categories
        write_json(folder / f"{kind}_{split}.json", whole)
