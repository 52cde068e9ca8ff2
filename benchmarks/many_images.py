"""`Predictor.detect_many` against a loop over single images: the same files, the same detections.

    python benchmarks/many_images.py --photos FOLDER --write docs/benchmarks.md

Both begin with files. The loop calls `detect` on one after the other, so that reading and resizing wait for
the detector; `detect_many` reads ahead in threads and detects in batches. RN50 with random weights, one trunk
for proposals and regions.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from pathlib import Path

import torch
from rates import waiting
from rivals import make_detector, spread, vocabulary_of
from rounds import alternate, command, compare, machine, markdown, processor, put_kind, versions

from clip_base.data.batch import ImageBatch
from regionclip.inference.predictor import Predictor
from regionclip.structures.detections import Detections
from regionclip.structures.transforms import ResizeConfig


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--photos", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--count", type=int, default=100, help="photographs")
    parser.add_argument("--short", type=int, default=480, help="pixels of the short side")
    parser.add_argument("--proposals", type=int, default=300)
    parser.add_argument("--region-head", default="shared", choices=["shared", "per_region"])
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 8], help="images at once")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--write", type=Path, help="Markdown page whose section takes the table")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    photos = sorted(options.photos.glob("*.jpg"))[: options.count]
    if len(photos) < options.count:
        raise SystemExit(f"{options.photos} holds only {len(photos)} .jpg files")
    predictor = make_predictor(options)

    def loop() -> list[Detections]:
        return [predictor.detect(photo) for photo in photos]

    def many(batch: int) -> list[Detections]:
        with contextlib.redirect_stderr(io.StringIO()):
            return predictor.detect_many(photos, batch_size=batch)

    works = {"ours": lambda: many(options.batches[0]), "a loop over single images": loop}
    for batch in options.batches[1:]:
        works[f"batches of {batch}"] = lambda batch=batch: many(batch)  # type: ignore[misc]
    seconds = alternate(works, options.rounds, waiting(options.device))
    task = f"`detect_many`, batches of {options.batches[0]}, {len(photos)} photographs"
    rows = compare(task, "images/s", len(photos), seconds)
    facts = f"Machine: {machine(options.threads)}.\nVersions: {versions('torch', 'torchvision')}.\n"
    facts += f"RN50, {options.region_head} head, short side {options.short}, {options.proposals} proposals, "
    facts += f"precision {options.precision}; median of {options.rounds} alternating rounds."
    text = f"{facts}\n\n    {command()}\n\n{markdown(rows)}"
    print(text)
    if options.write:
        put_kind(options.write, "many images", processor(options.device), text)


def make_predictor(options: argparse.Namespace) -> Predictor:
    """Returns a predictor with random weights whose regions differ enough to be told apart."""
    detector = make_detector("RN50", options.proposals, False, options.region_head, options.device)
    detector.set_vocabulary(vocabulary_of(65, detector.clip.config.embed_dim))
    detector.resize = ResizeConfig(short=[options.short], long=1333)
    noise = torch.randn(3, options.short, options.short, generator=torch.Generator().manual_seed(0))
    spread(detector, ImageBatch.pad([noise], 32).to(torch.device(options.device)))
    return Predictor(detector, None, options.precision)


if __name__ == "__main__":
    main()
