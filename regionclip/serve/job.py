"""The job `regionclip serve`: its options, and the page made from them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from clip_base.images.inputs import image_files
from clip_base.jobs.compute import DeviceOptions
from clip_base.jobs.config import Plugin, option, plugin
from clip_base.jobs.everyday import everyday
from clip_base.runtime.errors import InputError
from clip_base.synthetic.pictograms import TABLE
from clip_base.synthetic.scenes import ScenesConfig, generate
from regionclip.data.categories import parse_names
from regionclip.inference.options import DetectorFile
from regionclip.inference.predictor import load
from regionclip.proposals.base import GROUP as PROPOSERS
from regionclip.proposals.base import build_proposer
from regionclip.serve import api, page, server
from regionclip.serve.image_search import ImageSearch
from regionclip.serve.session import DemoSession, LoadedModel

MAX_EXAMPLES = 24


@everyday(
    'serve weights=detector.safetensors vocabulary="cat, dog"',
    input="vocabulary examples lists",
    output="host port",
    model="weights compare proposer.name",
    quality="score_threshold",
    speed="device",
)
@dataclass
class ServeConfig(DetectorFile, DeviceOptions):
    """Options of the page."""

    compare: str = option("", "a second model, shown beside the first; empty: none")
    vocabulary: str = option(
        "", 'initial names: "cat, dog", a file of names, coco; empty: those of the examples'
    )
    lists: list[str] = option(["coco", "lvis"], "lists of names for a clicked region: coco, lvis, files")
    index: str = option("", "index of `clip-base index`: a second tab searches its images; empty: none")
    examples: str = option("", "folder of example images; empty: generated ones")
    score_threshold: float = option(0.3, "initial minimum score of a box, 0 to 1", renamed_from="score")
    student: str = option(
        "auto",
        "frozen CLIP that is combined with a detector: auto: the one in its file; none, which takes half of "
        "the time; or the file of the CLIP that it was trained from",
    )
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0: reachable from other machines")
    port: int = option(7860, "port to listen on; 0: a free one")
    max_upload_mb: float = option(
        20.0, "largest file that can be uploaded, in MB (1,000,000 bytes)", renamed_from="megabytes"
    )
    megapixels: float = option(25.0, "largest image, in millions of pixels")
    proposer: Plugin = plugin(PROPOSERS, "none", "proposer of regions for weights without a proposal network")

    def __post_init__(self) -> None:
        """Checks the numbers."""
        if not (0 <= self.score_threshold <= 1 and 0 <= self.port <= 65535):
            raise InputError(
                f"score_threshold={self.score_threshold:g} must be in [0, 1], port={self.port} in 0…65535"
            )
        for name in ("max_upload_mb", "megapixels"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name}={getattr(self, name):g} must be above 0")


def serve(config: ServeConfig) -> None:
    """Opens a local web page to try a detector on, or two side by side."""
    if find_spec("gradio") is None:
        raise InputError("the page needs Gradio: pip install 'regionclip[serve]'")
    try:
        listener, address = server.listen(config.host, config.port)  # before anything is loaded
        with listener, server.private_folder() as folder:
            running = make_server(config, folder)
            print(f"{address}  (Ctrl-C ends it)", flush=True)
            print(f"programs: POST an image to {address}{api.DETECT}?names=cat,dog", flush=True)
            running.run([listener])
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)


def make_server(config: ServeConfig, folder: Path) -> Any:
    """Loads the models and the lists of names; returns the page's uvicorn.Server.

    Raises:
        InputError: a file is missing, damaged or does not fit; weights without proposals and no proposer.
    """
    lists = {Path(one).stem: tuple(parse_names(one)) for one in config.lists}
    if len(lists) < len(config.lists):
        raise InputError(f"lists={config.lists} must have different names, as the page shows these")
    generated = [category.name for category in TABLE[: ScenesConfig.categories]]
    names = parse_names(config.vocabulary) if config.vocabulary else generated
    models = [load_model(file, config) for file in (config.weights, config.compare) if file]
    session = DemoSession(models, lists, config.megapixels)
    found = ImageSearch(config.index, models[0].predictor.device) if config.index else None
    shown = example_images(config.examples, folder)
    blocks = page.build(session, folder, shown, names, config.score_threshold, found)

    def add_routes(app: Any) -> None:
        api.add_to(app, session, folder, config.score_threshold)
        if found is not None:
            api.add_found_images(app, found)

    return server.make(blocks, page.theme(), folder, config.host, config.max_upload_mb, add_routes)


def load_model(file: str, config: ServeConfig) -> LoadedModel:
    """Loads one of the models; its title has the file's folder, as many share a name."""
    print(f"loading {file}", flush=True)
    predictor = load(
        file,
        text_weights=config.text_weights,
        precision=config.precision,
        device=config.device,
        student=config.student,
    )
    if predictor.detector.network is None:
        if config.proposer["name"] == "none":
            raise InputError(f"{file} has no proposal network; give proposer.name=grid, for example")
        predictor.proposer = build_proposer(config.proposer, predictor.device)
    return LoadedModel("/".join(Path(file).parts[-2:]), predictor)


def example_images(source: str, folder: Path) -> list[Path]:
    """Returns the images to begin with: those of a folder `source`, else scenes generated in `folder`."""
    if not source:
        source = str(folder / "scenes" / "images" / "train")
        generate(ScenesConfig(f"{folder}/scenes", images=6, val_images=1, size=384, objects_min=2, workers=1))
    return image_files([source])[:MAX_EXAMPLES]
