"""The job `export-detector`: a detector as an ONNX file or PyTorch program that needs none of this code.

regionclip export-detector model.safetensors vocabulary="cat, dog" out=exported
"""

# H, W sides of an image, N detections, C names, D embedding size
from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import Dim

from clip_base.export import graphs
from clip_base.export.graphs import GraphFormats
from clip_base.export.runtimes import openvino_run, write_int8, write_openvino
from clip_base.export.towers import write_text_tower
from clip_base.images.decode import MEAN, Pixels, resize
from clip_base.images.inputs import image_files, read_upright
from clip_base.jobs.config import REQUIRED, option
from clip_base.jobs.everyday import everyday
from clip_base.jobs.run import RunFolder, files_of
from clip_base.runtime.errors import InputError
from clip_base.storage.files import replacing, write_json
from regionclip.checkpoints.load import look_for, vocabulary_for
from regionclip.data.categories import parse_names
from regionclip.export.detector_graph import DetectorGraph
from regionclip.inference.options import VOCABULARY_HELP, DetectorSource
from regionclip.models.detector import Detector
from regionclip.models.postprocess import DetectorConfig
from regionclip.proposals.rpn.proposer import load_network
from regionclip.structures.boxes import iou
from regionclip.structures.detections import Detections
from regionclip.structures.regions import ImageInfo
from regionclip.structures.transforms import ResizeTransform, resize_shortest_edge, to_batch

DETECTIONS = ("boxes", "scores", "labels")
SAME = 0.9  # IoU of boxes that are one detection, found twice
PAINTED = ((160, 224), (199, 131))  # heights and widths of images to compare on
STEP = 32  # pixels: sides that every backbone halves evenly
LEAST_TORCH = "2.9"  # torch.export of 2.8 refuses images of any size


@everyday(
    'export-detector weights=detector.safetensors vocabulary="cat, dog" out=detector_onnx',
    input="weights vocabulary images",
    output="out formats size suppress int8 dynamic_vocabulary",
    model="text_weights embeddings",
)
@dataclass(kw_only=True)
class ExportDetectorConfig(DetectorSource, GraphFormats):
    """Options of exporting a detector."""

    weights: str = option(
        REQUIRED, "a detector (ours or RegionCLIP's), or a CLIP with network=FILE", positional=True
    )
    vocabulary: str = option(REQUIRED, VOCABULARY_HELP)
    out: str = option(
        REQUIRED, "folder for detector.onnx, detector.json and related files", runtime_only=True
    )
    dynamic_vocabulary: bool = option(
        False,
        "make the name embeddings inputs of the graph, and export the text tower",
        renamed_from="exchangeable",
    )
    size: list[int] = option([], "fixed height and width of the image in pixels; empty: any")
    suppress: bool = option(
        True, "false: the graph ends at boxes [P, 4] and scores [P, C], before overlapping boxes are dropped"
    )
    int8: bool = option(
        False,
        "also write detector.int8.onnx (and .xml) with convolutions in 8-bit integers, whose ranges are "
        "measured on `images`",
    )
    network: str = option("", "proposal network's file, for a CLIP or a detector without one")
    images: list[str] = option(
        [], "images, or folders of them, to compare on; empty: synthetic ones", renamed_from="pictures"
    )

    def __post_init__(self) -> None:
        """Checks the size."""
        if self.size and (len(self.size) != 2 or min(self.size) < STEP):
            raise InputError(f"size must be a height and a width of at least {STEP} pixels, got {self.size}")
        if "openvino" in self.formats and self.suppress:
            raise InputError(
                "OpenVINO has no form for the loop that suppresses overlapping boxes: set suppress=false and "
                "drop them in your program, or leave openvino out of formats"
            )
        if self.int8 and ("onnx" not in self.formats or self.dynamic_vocabulary):
            raise InputError("int8=true needs formats with onnx and a fixed vocabulary")


def export_detector(config: ExportDetectorConfig) -> None:
    """Writes a detector as an ONNX file that runs without PyTorch, checked in onnxruntime."""
    graphs.check_formats(config.formats)
    if torch.__version__ < LEAST_TORCH:
        raise InputError(
            f"exporting a detector needs PyTorch {LEAST_TORCH} or newer, found {torch.__version__}; "
            "pip install --upgrade torch torchvision"
        )
    names = parse_names(config.vocabulary)
    inputs = config.inputs() | files_of(config, "network", "vocabulary")
    run = RunFolder(config.out, config, "region-export-detector", inputs)
    if run.finished() is not None:
        print(f"{config.out} already exists and was made with the same options")
        return
    detector = load(config)
    if detector.student is not None and config.dynamic_vocabulary:
        raise InputError(
            "a graph whose vocabulary can be exchanged cannot know which names are novel, which decides how "
            "much the frozen student counts; leave it out (student.weights=none), or set "
            "dynamic_vocabulary=false"
        )
    vocabulary = vocabulary_for(detector, names, names, config.templates, embeddings=config.embeddings)
    look_for(detector, vocabulary, config.templates, own_words=True, source=config.weights)
    images = comparison_images(config, detector)
    graph = graph_of(detector, config.dynamic_vocabulary, config.size, config.suppress)
    compare = comparison(detector, graph, images) if config.suppress else raw_comparison(graph, images)
    differences = graphs.write_graph(graph, run.path, "detector", config.formats, compare)
    if config.int8:
        differences |= write_int8_files(graph, run.path, config, images, compare)
    if config.dynamic_vocabulary:
        write_vocabulary(detector, graph, run.path / "vocabulary.npz")
        if hasattr(detector.clip, "text"):
            differences |= write_text_tower(detector.clip, run.path, config.formats)
    write_json(run.path / "detector.json", about(detector, graph, config), indent=2)
    run.finish({"differences": differences, "images": len(images)})
    for name, difference in differences.items():
        print(f"{run.path / name}: differs from PyTorch by at most {difference:.1e}")


def write_int8_files(
    graph: graphs.Graph,
    folder: Path,
    config: ExportDetectorConfig,
    images: Sequence[Pixels],
    compare: Callable[[graphs.Run], float],
) -> dict[str, float]:
    """Writes the graph with convolutions in 8-bit integers; returns the differences by file name.

    They are told and not limited: rounding to 8 bits moves scores, and may exchange proposals.
    """
    path = folder / "detector.int8.onnx"
    print(f"{path}: measuring ranges on {len(images)} images", file=sys.stderr)
    samples = [{"image": torch.from_numpy(pixels)} for pixels in images]
    write_int8(folder / "detector.onnx", path, samples)
    found = {path.name: compare(graphs.onnx_run(path, graph.outputs))}
    if "openvino" in config.formats:
        other = path.with_suffix(".xml")
        write_openvino(path, other)
        found[other.name] = compare(openvino_run(other, graph.outputs))
    return found


def load(config: ExportDetectorConfig) -> Detector:
    """Returns the detector in float32, with its proposal network and the size at which it sees images."""
    detector = config.load()
    if config.network:
        if detector.network is not None:
            raise InputError(f"{config.weights} has a proposal network; drop network={config.network}")
        network = load_network(config.network, detector.clip.map_tower)
        detector = detector.with_network(network)
    if detector.network is None:
        raise InputError(f"{config.weights} has no proposal network; give one: network=FILE")
    return detector.float().eval()


def graph_of(
    detector: Detector, dynamic_vocabulary: bool, size: Sequence[int], suppress: bool
) -> graphs.Graph:
    """Returns what to write of a detector with a vocabulary.

    Args:
        detector: with a proposal network.
        dynamic_vocabulary: whether the names' embeddings are inputs.
        size: height and width of the image; empty: any.
        suppress: see `DetectorGraph`.
    """
    module = DetectorGraph(detector, suppress).eval()
    # Two cells of the coarsest map: of maps of one cell PyTorch makes another graph.
    least = 2 * max(STEP, *module.network.config.strides)
    height, width = size or (2 * least, 3 * least)
    inputs = {"image": torch.zeros(height, width, 3, dtype=torch.uint8)}
    dynamic: dict[str, dict[int, Dim]] = {}
    if not size:
        dynamic["image"] = {0: Dim("height", min=least), 1: Dim("width", min=least)}
    if dynamic_vocabulary:
        # Traced with several names, so that it is no graph of one.
        rows = torch.nn.functional.normalize(torch.ones(3, module.embeddings.shape[1]), dim=1)
        names = Dim("names")
        inputs["embeddings"], dynamic["embeddings"] = rows, {0: names}
        if module.background is not None:
            inputs["background"] = module.background
        inputs["alpha"], dynamic["alpha"] = torch.full((3,), 0.5), {0: names}
    return graphs.Graph(module, inputs, dynamic, DETECTIONS if suppress else DETECTIONS[:2])


def vocabulary_inputs(detector: Detector, graph: graphs.Graph) -> dict[str, Tensor]:
    """Returns the inputs of a dynamic graph that stand for a detector's vocabulary; else none."""
    module = graph.module
    assert isinstance(module, DetectorGraph)
    values = {"embeddings": detector.classifier, "background": module.background, "alpha": detector.alpha}
    return {name: value for name, value in values.items() if name in graph.inputs and value is not None}


def write_vocabulary(detector: Detector, graph: graphs.Graph, path: Path) -> None:
    """Writes a vocabulary as the inputs of a dynamic graph, with its `names`, to an `.npz` file."""
    assert detector.vocabulary is not None
    arrays: dict[str, Any] = {"names": np.array(detector.vocabulary.names)}
    arrays |= {name: value.numpy() for name, value in vocabulary_inputs(detector, graph).items()}
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def comparison_images(config: ExportDetectorConfig, detector: Detector) -> list[Pixels]:
    """Returns images [H, W, 3] to compare on, at the size at which the detector sees them."""
    if not config.images:
        return [_blots(config.size or size, seed) for seed, size in enumerate(PAINTED)]
    found, sides = [], detector.resize
    for file in image_files(config.images):
        pixels = read_upright(file)[0]
        if config.size:
            found.append(resize(pixels, config.size[1], config.size[0]))
        else:
            found.append(resize_shortest_edge(pixels, sides.short[0], sides.long, filter=sides.filter)[0])
    return found


def _blots(size: Sequence[int], seed: int) -> Pixels:
    """Paints an image of this height and width with some structure of several sizes."""
    rng = np.random.default_rng(seed)
    parts = [rng.integers(0, 85, (cells, cells, 3), dtype=np.uint8) for cells in (3, 8, 24)]
    painted: Pixels = np.add.reduce([resize(part, size[1], size[0]) for part in parts], dtype=np.uint8)
    return painted


def comparison(
    detector: Detector, graph: graphs.Graph, images: Sequence[Pixels]
) -> Callable[[graphs.Run], float]:
    """Returns a function that compares what was written with `Detector.detect_batch` on images."""
    multiple = detector.resize.multiple
    wanted = []
    for pixels in images:
        size = (pixels.shape[0], pixels.shape[1])
        found = detector.detect_batch(
            to_batch([pixels], multiple), [ResizeTransform(size, size)], [ImageInfo(0, *size)]
        )
        wanted += found

    def differences(run: graphs.Run) -> float:
        largest = 0.0
        for pixels, one in zip(images, wanted, strict=True):
            boxes, scores, labels = run(
                {"image": torch.from_numpy(pixels), **vocabulary_inputs(detector, graph)}
            )
            found = dataclasses.replace(one, boxes=boxes, scores=scores, labels=labels)
            largest = max(largest, difference(one, found, detector.config))
        return largest

    return differences


def difference(one: Detections, other: Detections, config: DetectorConfig) -> float:
    """Returns by how much the scores of the same things differ most in two lists of detections, best first.

    A detection that the other list lacks counts as if it scored there what a detection has to in order to be
    in it: more than the last of a full list, or the least score of all.
    """
    largest, floor = 0.0, config.soft_nms_min_score if config.nms_type == "soft" else config.min_score
    for mine, theirs in ((one, other), (other, one)):
        full = len(theirs) >= config.max_detections
        least = float(theirs.scores[-1]) if full else floor
        if not len(mine):
            continue
        same = (mine.labels[:, None] == theirs.labels) & (iou(mine.boxes, theirs.boxes) >= SAME)
        apart = (mine.scores[:, None] - theirs.scores).abs().masked_fill(~same, torch.inf)  # [N, M]
        lacking = (mine.scores - least).clamp(min=0)
        nearest = apart.amin(1) if len(theirs) else lacking
        largest = max(largest, float(torch.where(nearest.isfinite(), nearest, lacking).max()))
    return largest


def raw_comparison(graph: graphs.Graph, images: Sequence[Pixels]) -> Callable[[graphs.Run], float]:
    """Returns a function that compares scores before suppression with the module's, row by row."""
    module = graph.module
    assert isinstance(module, DetectorGraph)
    inputs = vocabulary_inputs(module.detector, graph)

    def differences(run: graphs.Run) -> float:
        largest = 0.0
        for pixels in images:
            given = {"image": torch.from_numpy(pixels), **inputs}
            with torch.no_grad():
                wanted = module(**given)[1]
            largest = max(largest, float((run(given)[1] - wanted).abs().max()))
        return largest

    return differences


def about(detector: Detector, graph: graphs.Graph, config: ExportDetectorConfig) -> dict[str, Any]:
    """Returns what a program needs to know beside the graph."""
    assert detector.vocabulary is not None
    resize, settings = detector.resize, detector.config
    return {
        "names": list(detector.vocabulary.names),
        "inputs": {
            name: [str(value.dtype).removeprefix("torch."), *_sides(graph, name)]
            for name, value in graph.inputs.items()
        },
        "outputs": list(graph.outputs),
        "size": list(config.size) or None,
        "short": resize.short[0],
        "long": resize.long,
        "filter": resize.filter,
        "fill": [round(255 * value) for value in MEAN],
        "settings": dataclasses.asdict(settings),
        "suppressed": config.suppress,
    }


def _sides(graph: graphs.Graph, name: str) -> list[int | str]:
    """Returns an input's sides, by name where they may vary."""
    named = {axis: str(dim.__name__) for axis, dim in graph.dynamic.get(name, {}).items()}
    return [named.get(axis, side) for axis, side in enumerate(graph.inputs[name].shape)]
