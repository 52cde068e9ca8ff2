"""Error over compute and robustness under shift, of towers of several widths on a generated world.

    python benchmarks/scaling.py folder

All towers are trained on the same pairs for the same number of steps. `clip-base benchmark` then measures
zero-shot and linear probes on validation images and on four shifted versions of them: other textures of the
background, smaller objects, noise, and drawings of the edges. Its page, table and figures are in
`folder/table`.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import cv2
import numpy as np
from worlds import PLAIN, by_class, coco, job, same, training

SHIFTS = ("textures", "small", "noise", "sketches")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="for worlds and towers; what is there already is kept")
    parser.add_argument("--widths", type=int, nargs="+", default=[8, 12, 16, 24, 32, 40, 48, 64])
    parser.add_argument("--images", type=int, default=6000, help="training images")
    parser.add_argument(
        "--per-class", type=int, default=40, help="images of a class that probes see, and that test"
    )
    parser.add_argument("--categories", type=int, default=12)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-4, help="2e-3 leaves some widths untrained")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def world(
    out: Path, options: argparse.Namespace, images: int, seed: int, smallest: float, largest: float
) -> Path:
    """Generates images of one object each."""
    sizes = {"object_min": smallest, "object_max": largest}
    return job(
        "scenes",
        out=out,
        images=images,
        val_images=3 * options.per_class * options.categories,
        seed=seed,
        categories=options.categories,
        **(PLAIN | sizes),
    )


def noisy(pixels: np.ndarray) -> np.ndarray:
    chance = np.random.default_rng(int(pixels.sum()))
    return np.clip(pixels + chance.normal(0, 20, pixels.shape), 0, 255).astype(np.uint8)


def sketched(pixels: np.ndarray) -> np.ndarray:
    """Returns dark lines on white where brightness or color changes."""
    floats = cv2.GaussianBlur(pixels, (3, 3), 0).astype(np.float32)
    edges = np.hypot(cv2.Sobel(floats, -1, 1, 0), cv2.Sobel(floats, -1, 0, 1)).max(2)
    lines = np.clip(255 - 1.2 * edges, 0, 255).astype(np.uint8)
    return np.repeat(lines[..., None], 3, 2)


def datasets(options: argparse.Namespace) -> tuple[Path, list[Path]]:
    """Returns the world to train on, and the folders of the datasets, the shifted ones last."""
    root, seed = options.folder, options.seed
    main = world(root / "world", options, options.images, seed, 0.5, 0.65)
    other = world(root / "other_textures", options, 1, seed + 1000, 0.5, 0.65)
    small = world(root / "small_objects", options, 1, seed, 0.42, 0.5)
    folders = [root / "data" / name for name in ("pictograms", *SHIFTS)]
    if not (root / "data" / "done").exists():
        shutil.rmtree(root / "data", ignore_errors=True)
        by_class(main, "train", options.per_class, folders[0] / "train", same)
        sources = (main, other, small, main, main)
        changes = (same, same, same, noisy, sketched)
        for source, folder, change in zip(sources, folders, changes, strict=True):
            by_class(source, "val", options.per_class, folder / "test", change)
        (root / "data" / "done").touch()
    return main, folders


def main() -> None:
    options = arguments()
    train, folders = datasets(options)
    models = []
    for width in options.widths:
        out = job(
            "pretrain",
            **coco(train),
            **training(options.steps, options.batch_size, options.seed, options.lr),
            tower__vision__width=width,
            out=options.folder / f"w{width:02d}",
        )
        named = options.folder / "models" / f"width-{width}.safetensors"
        named.parent.mkdir(exist_ok=True)
        shutil.copy(out / "model.safetensors", named)
        models.append(str(named))
    job(
        "benchmark",
        models=f"[{','.join(models)}]",
        datasets=f"[{','.join(map(str, folders))}]",
        tasks="[zeroshot,linear_probe,few_shot]",
        templates="simple",
        shifts=f"[{','.join(f'pictograms:{name}' for name in SHIFTS)}]",
        out=options.folder / "table",
    )


if __name__ == "__main__":
    main()
