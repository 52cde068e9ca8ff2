"""Checks COCO's official files and makes the open-vocabulary split (48 base, 17 novel categories) from them.

    python tools/prepare_coco.py                          # datasets/coco, as unpacked from cocodataset.org
    python tools/prepare_coco.py --root DIR --train-instances instances_train.json --val-instances …

Written to the folder of the annotations, or to --out:

    instances_train2017_base48.json   base boxes only; every image is kept, with or without one (--drop-empty)
    instances_val2017_65.json         base and novel boxes; images with neither are left out, as published
    split.json                        the names: {"base": […], "novel": […]}

Exit code 0: everything is there; 1: something is missing (what could be made was made); 2: a bad call.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_base.data.coco import read_instances
from clip_base.runtime.errors import InputError
from clip_base.storage.files import write_json
from regionclip.data.categories import Split, load_split
from regionclip.data.coco import category_ids_by_name, image_fields

ANNOTATIONS_URL = "http://images.cocodataset.org/annotations/annotations_trainval2017.zip"
IMAGES_URL = "http://images.cocodataset.org/zips/{name}.zip"


@dataclass(frozen=True)
class Layout:
    """Where the files are."""

    instances: dict[str, Path]
    captions: dict[str, Path]
    images: dict[str, Path]


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    root = Path(options.root)
    layout = Layout(
        instances={"train": root / options.train_instances, "val": root / options.val_instances},
        captions={"train": root / options.train_captions, "val": root / options.val_captions},
        images={"train": root / options.train_images, "val": root / options.val_images},
    )
    try:
        out = Path(options.out) if options.out else None
        return prepare(layout, options.split, out, options.masks, options.drop_empty)
    except (InputError, OSError) as error:
        print(f"prepare_coco: {error}", file=sys.stderr)
        return 2


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--root", default="datasets/coco", help="folder that the other paths are relative to")
    for part in ("train", "val"):
        for kind in ("instances", "captions"):
            default = f"annotations/{kind}_{part}2017.json"
            parser.add_argument(f"--{part}-{kind}", default=default, help=f"{kind} of the {part} images")
        parser.add_argument(f"--{part}-images", default=f"{part}2017", help=f"folder of the {part} images")
    parser.add_argument("--split", default="coco", help="coco, or a JSON file with base and novel names")
    parser.add_argument("--out", default="", help="folder to write to; empty: that of the instances files")
    add_common(parser)
    return parser.parse_args(arguments)


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--masks", action="store_true", help="keep the masks, which make the files 3 times as large"
    )
    parser.add_argument(
        "--drop-empty", action="store_true", help="leave out training images without a base box"
    )


def prepare(layout: Layout, split_name: str, out: Path | None, masks: bool, drop_empty: bool) -> int:
    """Checks the layout, writes what can be made, and returns the exit code."""
    missing = []
    for captions in layout.captions.values():
        if not captions.is_file():
            missing.append(f"{captions} (captions, for mining; in {ANNOTATIONS_URL})")
    split = None
    for part, path in layout.instances.items():
        if not path.is_file():
            missing.append(f"{path} (boxes; in {ANNOTATIONS_URL})")
            continue
        print(f"reading {path} ({path.stat().st_size / 2**20:.0f} MiB)", flush=True)
        content = read_instances(path)
        missing += absent_images(content, layout.images[part])
        split = load_split(split_name, list(category_ids_by_name(content["categories"], path)))
        names = split.base if part == "train" else split.all
        ending = f"{'base' if part == 'train' else ''}{len(names)}.json"
        # The published split has the 4,836 of 5,000 validation images in which one of its 65 categories
        # occurs.
        target = (out or path.parent) / f"{path.stem}_{ending}"
        write_part(content, names, target, masks, keep_empty=part == "train" and not drop_empty)
    if split is not None:
        folder = out or next(path.parent for path in layout.instances.values() if path.is_file())
        write_split(split, folder / "split.json")
    return tell(missing)


def write_split(split: Split, path: Path) -> None:
    write_json(path, {"base": list(split.base), "novel": list(split.novel)}, indent=1)
    print(f"wrote {path}: {len(split.base)} base and {len(split.novel)} novel categories")


def tell(missing: list[str]) -> int:
    """Says what is missing; returns the exit code."""
    for line in missing:
        print(f"missing: {line}", file=sys.stderr)
    if missing:
        print("fetch what is missing, or point the options at it (--help), and start again", file=sys.stderr)
    return 1 if missing else 0


def absent_images(content: dict[str, Any], folder: Path) -> list[str]:
    """Returns a line for each folder that lacks images which the annotations name, relative to `folder`."""
    wanted: dict[Path, set[str]] = {}
    for place, entry in enumerate(content["images"]):
        file = folder / image_fields(entry, folder, place)[1]
        wanted.setdefault(file.parent, set()).add(file.name)
    lines = []
    for place, names in sorted(wanted.items()):
        source = IMAGES_URL.format(name=place.name)
        if not place.is_dir():
            lines.append(f"{place}/ ({len(names)} images; {source})")
            continue
        absent = sorted(names - set(os.listdir(place)))
        print(f"{place}: {len(names) - len(absent)} of {len(names)} images are there", flush=True)
        if absent:
            lines.append(f"{len(absent)} of {len(names)} images in {place}, first {absent[0]} ({source})")
    return lines


def write_part(
    content: dict[str, Any], names: Sequence[str], target: Path, masks: bool, keep_empty: bool
) -> None:
    """Writes the annotations of these categories alone; `keep_empty`: also images without any."""
    categories = [entry for entry in content["categories"] if entry["name"] in set(names)]
    ids = {entry["id"] for entry in categories}
    annotations = [
        {key: value for key, value in entry.items() if masks or key != "segmentation"}
        for entry in content["annotations"]
        if entry.get("category_id") in ids
    ]
    images = content["images"]
    if not keep_empty:
        shown = {entry.get("image_id") for entry in annotations}
        images = [entry for entry in images if entry.get("id") in shown]
    others = {
        key: value for key, value in content.items() if key not in ("images", "annotations", "categories")
    }
    write_json(target, {**others, "images": images, "annotations": annotations, "categories": categories})
    print(
        f"wrote {target}: {len(images)} images, {len(annotations)} boxes, {len(categories)} categories",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
