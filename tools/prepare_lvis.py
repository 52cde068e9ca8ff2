"""Checks LVIS v1's official files and makes the open-vocabulary split (866 base, 337 novel) from them.

    python tools/prepare_lvis.py                          # datasets/lvis, images in datasets/coco
    python tools/prepare_lvis.py --root DIR --images DIR

Written to the folder of the annotations, or to --out:

    lvis_v1_train_base866.json   no box of a rare category; every image is kept (--drop-empty: without boxes)
    split.json                   the names: {"base": […], "novel": […]}

Validation needs no file of its own: `regionclip evaluate annotations=lvis_v1_val.json split=lvis`.

Exit code 0: everything is there; 1: something is missing (what could be made was made); 2: a bad call.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from prepare_coco import absent_images, add_common, tell, write_part, write_split

from clip_base.data.coco import read_instances
from clip_base.runtime.errors import InputError
from regionclip.data.categories import load_split
from regionclip.data.coco import category_ids_by_name, frequencies

ANNOTATIONS_URL = "https://www.lvisdataset.org/dataset"


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        return prepare(options)
    except (InputError, OSError) as error:
        print(f"prepare_lvis: {error}", file=sys.stderr)
        return 2


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--root", default="datasets/lvis", help="folder of the annotations")
    parser.add_argument("--images", default="datasets/coco", help="folder with train2017 and val2017")
    for part in ("train", "val"):
        parser.add_argument(
            f"--{part}", default=f"lvis_v1_{part}.json", help=f"annotations of the {part} images"
        )
    parser.add_argument("--out", default="", help="folder to write to; empty: that of the annotations")
    add_common(parser)
    return parser.parse_args(arguments)


def prepare(options: argparse.Namespace) -> int:
    """Checks the files, writes what can be made, and returns the exit code."""
    root, missing = Path(options.root), []
    out = Path(options.out) if options.out else root
    for part in ("train", "val"):
        path = root / getattr(options, part)
        if not path.is_file():
            missing.append(f"{path} ({ANNOTATIONS_URL})")
            continue
        print(f"reading {path} ({path.stat().st_size / 2**20:.0f} MiB)", flush=True)
        content = read_instances(path)
        missing += absent_images(content, Path(options.images))
        names = list(category_ids_by_name(content["categories"], path))
        split = load_split("lvis", names, frequencies(content["categories"]))
        if part == "train":
            target = out / f"{path.stem}_base{len(split.base)}.json"
            write_part(content, split.base, target, options.masks, keep_empty=not options.drop_empty)
            write_split(split, out / "split.json")
    return tell(missing)


if __name__ == "__main__":
    sys.exit(main())
