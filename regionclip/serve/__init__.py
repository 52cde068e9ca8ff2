"""`regionclip serve`: a local web page to try a detector on, or two side by side."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clip_base.jobs.config import REQUIRED, Plugin, option, plugin
from clip_base.runtime.errors import InputError

if TYPE_CHECKING:
    from regionclip.inference.predictor import Predictor
    from regionclip.serve.desk import Desk

PROPOSERS = "regionclip.proposers"
DRAWN = 6  # examples
MOST_EXAMPLES = 24
SIDE = 384  # pixels of the drawn examples


@dataclass
class ServeConfig:
    """Options of the page."""

    weights: str = option(REQUIRED, "a detector (ours or RegionCLIP's), or a CLIP (then give a proposer)")
    compare: str = option("", "a second one, shown beside the first; empty: none")
    vocabulary: str = option(
        "", 'names at first: "cat, dog", a file with one a line, coco; empty: those of the drawn examples'
    )
    lists: list[str] = option(
        ["coco", "lvis"], "a region's nearest names may come from these as well: coco, lvis, files of names"
    )
    examples: str = option("", "folder of pictures to begin with; empty: drawn scenes")
    score: float = option(0.3, "score that boxes need at first, 0 to 1")
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0: other machines reach the page too")
    port: int = option(7860, "port to listen on; 0: a free one")
    megabytes: float = option(20.0, "largest file that can be uploaded, in MB (1,000,000 bytes)")
    megapixels: float = option(25.0, "largest picture, in millions of pixels")
    proposer: Plugin = plugin(
        PROPOSERS, "none", "where regions come from for weights without a proposal network of their own"
    )
    text: str = option("", "CLIP whose text tower embeds names, for RegionCLIP's detectors, which bring none")
    precision: str = option(
        "auto", "auto takes bf16 where the processor computes in it", choices=("auto", "fp32", "bf16")
    )
    device: str = option("auto", "auto takes a GPU when there is one")

    def __post_init__(self) -> None:
        """Checks the numbers."""
        if not 0 <= self.score <= 1:
            raise InputError(f"score must lie in [0, 1], found {self.score:g}")
        if not 0 <= self.port <= 65535:
            raise InputError(f"port must lie in 0…65535, found {self.port}")
        for name in ("megabytes", "megapixels"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be above 0, found {getattr(self, name):g}")


def serve(config: ServeConfig) -> None:
    """Opens a local web page to try a detector on, or two side by side."""
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise InputError("the page needs Gradio: pip install 'regionclip[serve]'") from None
    from regionclip.serve import page, server

    listener = server.listen(config.host, config.port)  # first of all: loading takes a while
    try:
        with listener, server.private_folder() as folder:
            desk = open_desk(config)
            pictures = example_pictures(config.examples, folder)
            blocks = page.build(desk, folder, pictures, first_names(config.vocabulary), config.score)
            print(f"{server.address(listener)}  (Ctrl-C ends it)", flush=True)
            app = server.application(blocks, page.looks(), folder, config.host, config.megabytes)
            server.server(app).run([listener])
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)


def open_desk(config: ServeConfig) -> Desk:
    """Loads the checkpoints and the lists of names.

    Raises:
        InputError: a file is missing, damaged or does not fit; weights without proposals and no proposer.
    """
    from regionclip.data.categories import parse_names
    from regionclip.serve.desk import Checkpoint, Desk, Limits

    lists = {Path(one).stem: tuple(parse_names(one)) for one in config.lists}
    files = [config.weights, *([config.compare] if config.compare else [])]
    checkpoints = []
    for file in files:
        print(f"loading {file}", flush=True)
        checkpoints.append(Checkpoint(title_of(file), _load(file, config)))
    return Desk(checkpoints, Limits(config.megabytes, config.megapixels), lists)


def _load(file: str, config: ServeConfig) -> Predictor:
    from regionclip.inference.predictor import load
    from regionclip.proposals.base import build_proposer

    predictor = load(file, text=config.text, precision=config.precision, device=config.device)
    if predictor.detector.network is None:
        if config.proposer["name"] == "none":
            raise InputError(f"{file} has no proposal network; give proposer.name=grid, say")
        predictor.proposer = build_proposer(config.proposer, predictor.device)
    return predictor


def title_of(file: str) -> str:
    """Returns what a checkpoint is called on the page: the file with its folder, as many share a name."""
    path = Path(file)
    return f"{path.parent.name}/{path.name}" if path.parent.name else path.name


def first_names(vocabulary: str) -> str:
    """Returns the names that stand on the page at first, as one types them.

    Raises:
        InputError: a file that does not exist or holds no names, repeated names.
    """
    from clip_base.synthetic.pictograms import TABLE
    from clip_base.synthetic.scenes import ScenesConfig
    from regionclip.data.categories import parse_names

    drawn = [category.name for category in TABLE[: ScenesConfig.categories]]
    return ", ".join(parse_names(vocabulary) if vocabulary else drawn)


def example_pictures(folder: str, place: Path) -> list[Path]:
    """Returns the pictures to begin with: those of a folder, else scenes drawn into `place`.

    Raises:
        InputError: the folder does not exist or holds no pictures.
    """
    from clip_base.images.inputs import picture_files
    from clip_base.synthetic.scenes import ScenesConfig, generate

    if folder:
        return picture_files([folder])[:MOST_EXAMPLES]
    world = place / "drawn"
    options = ScenesConfig(out=str(world), images=DRAWN, val_images=1, size=SIDE, objects_min=2, workers=1)
    generate(options)
    return picture_files([str(world / "images" / "train")])
