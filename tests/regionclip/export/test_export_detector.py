"""An exported detector finds what the detector finds, in onnxruntime alone."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clip_base.export import graphs
from clip_base.models.clip import CLIP
from clip_base.runtime.errors import InputError
from clip_base.storage.files import read_json
from regionclip.concepts.vocabulary import Vocabulary
from regionclip.export.detector import (
    DETECTIONS,
    ExportDetectorConfig,
    comparison,
    comparison_images,
    difference,
    export_detector,
    graph_of,
    raw_comparison,
    vocabulary_inputs,
)
from regionclip.models.detector import Detector
from regionclip.models.postprocess import DetectorConfig
from regionclip.proposals.rpn.config import ProposalNetworkConfig
from regionclip.proposals.rpn.network import ProposalNetwork
from regionclip.structures.detections import Detections
from regionclip.structures.transforms import ResizeConfig

onnxruntime = pytest.importorskip("onnxruntime")
NAMES = ("cup", "star", "tree", "kite")
DOCS = Path(__file__).parents[3] / "docs" / "export.md"
MakeDetector = Callable[..., Detector]


def vocabulary(count: int, seed: int = 4, novel: bool = False) -> Vocabulary:
    generator = torch.Generator().manual_seed(seed)
    rows = F.normalize(torch.randn(count, 32, generator=generator), dim=1)
    names = tuple(f"thing {number}" for number in range(count))
    return Vocabulary(names, rows, torch.arange(count) % 2 == 0 if novel else None)


def written(detector: Detector, folder: Path, forms: list[str], **options: Any) -> tuple[graphs.Graph, Any]:
    """Writes a detector's graph and returns it with the differences of each file."""
    options = {"dynamic_vocabulary": False, "size": [], "suppress": True, **options}
    graph = graph_of(detector, **options)
    config = ExportDetectorConfig(weights="", vocabulary="", out="", size=options["size"])
    pictures = comparison_images(config, detector)
    compare = (
        comparison(detector, graph, pictures) if options["suppress"] else raw_comparison(graph, pictures)
    )
    return graph, graphs.write_graph(graph, folder, "detector", forms, compare)


@pytest.fixture(scope="module")
def dynamic(
    make_detector: MakeDetector, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Detector, graphs.Graph, dict[str, float], Path]:
    """A trained-like detector with soft suppression, written in both forms, its names' embeddings inputs."""
    detector = make_detector(alpha_base=0.3, alpha_novel=0.6)
    with torch.no_grad():
        assert detector.background is not None
        detector.background += 0.1
    detector.set_vocabulary(vocabulary(4, novel=True))
    folder = tmp_path_factory.mktemp("dynamic")
    graph, differences = written(detector, folder, ["onnx", "torch"], dynamic_vocabulary=True)
    return detector, graph, differences, folder


@pytest.fixture(scope="module")
def runs(dynamic: Any) -> list[graphs.Run]:
    """The two files, loaded once."""
    folder = dynamic[-1]
    return [
        graphs.onnx_run(folder / "detector.onnx", DETECTIONS),
        graphs.program_run(folder / "detector.pt2"),
    ]


@pytest.mark.slow
def test_both_files_find_what_the_detector_finds(dynamic: Any) -> None:
    _, _, differences, folder = dynamic
    assert set(differences) == {"detector.onnx", "detector.pt2"}
    assert max(differences.values()) < graphs.TOLERANCE
    assert {path.name for path in folder.iterdir()} == set(differences)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["shared", "dense"])
def test_region_heads_that_run_once_are_written(
    make_detector: MakeDetector, tmp_path: Path, head: str
) -> None:
    plain = make_detector()
    parts = (plain.network, plain.box_head, plain.background)
    detector = Detector(plain.clip, plain.config, *parts, region_head=head).eval()
    detector.set_vocabulary(vocabulary(4))
    _, differences = written(detector, tmp_path, ["onnx"])
    assert differences["detector.onnx"] < graphs.TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("size", [(65, 90), (129, 64)])
def test_other_names_and_sizes_can_be_given_later(
    dynamic: Any, runs: list[graphs.Run], count: int, size: tuple[int, int]
) -> None:
    detector, graph, _, _ = dynamic
    before = detector.vocabulary
    detector.set_vocabulary(vocabulary(count, seed=9))
    pixels = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    for run in runs:
        assert comparison(detector, graph, [pixels])(run) < graphs.TOLERANCE
        boxes, scores, labels = run({"image": torch.from_numpy(pixels), **vocabulary_inputs(detector, graph)})
        assert len(boxes) == len(scores) == len(labels) > 0
        assert int(labels.max()) < count
    detector.set_vocabulary(before)


def own_network(backbone: str, design: str) -> ProposalNetwork:
    torch.manual_seed(2)
    strides = {"fpn": [8, 16, 32], "c4": [16]}[design]
    config = ProposalNetworkConfig(
        backbone=backbone,
        design=design,
        strides=strides,
        anchor_sizes=[16.0, 32.0, 64.0],
        pixels="caffe",
        merge_levels=False,
        channels=16,
    )
    return ProposalNetwork(config).eval()


@pytest.mark.slow
@pytest.mark.parametrize("design", ["c4", "fpn"])
def test_a_detector_of_two_backbones_finds_the_same(
    make_clip: Callable[..., CLIP], tmp_path: Path, design: str
) -> None:
    settings = DetectorConfig(
        max_proposals=12, nms_type="nms", fusion="legacy_logit", temperature=0.05, max_detections=20
    )
    network = own_network("resnet50", design)
    detector = Detector.untrained(make_clip(), settings, network, resize=ResizeConfig(multiple=1)).eval()
    detector.set_vocabulary(vocabulary(3))
    _, differences = written(detector, tmp_path, ["onnx"])
    assert differences["detector.onnx"] < graphs.TOLERANCE


@pytest.mark.slow
def test_a_clip_with_a_proposal_network_of_a_fixed_size_finds_the_same(
    make_clip: Callable[..., CLIP], make_network: Callable[[], ProposalNetwork], tmp_path: Path
) -> None:
    settings = DetectorConfig(
        max_proposals=10, max_detections=15, nms_type="nms", nms=0.4, allow_background=True
    )
    detector = Detector(make_clip("vit"), settings, make_network()).eval()
    detector.set_vocabulary(vocabulary(3))
    _, differences = written(detector, tmp_path, ["onnx"], size=[64, 96])
    assert differences["detector.onnx"] < graphs.TOLERANCE
    (image,) = onnxruntime.InferenceSession(tmp_path / "detector.onnx").get_inputs()
    assert (image.name, image.shape) == ("image", [64, 96, 3])


@pytest.mark.slow
def test_scores_before_suppression_can_be_asked_for(make_detector: MakeDetector, tmp_path: Path) -> None:
    detector = make_detector(min_score=0.0)
    detector.set_vocabulary(vocabulary(4))
    graph, differences = written(detector, tmp_path, ["torch"], suppress=False, size=[64, 64])
    assert differences["detector.pt2"] < graphs.TOLERANCE
    assert graph.outputs == ("boxes", "scores")
    boxes, scores = graphs.program_run(tmp_path / "detector.pt2")(
        {"image": torch.randint(256, (64, 64, 3), dtype=torch.uint8)}
    )
    assert (boxes.shape, scores.shape) == ((20, 4), (20, 4))
    assert 0 <= float(scores.min()) <= float(scores.max()) <= 1


def detections(scores: list[float], labels: list[int], shift: float = 0.0) -> Detections:
    boxes = torch.tensor([[10.0 * row + shift, 0, 10.0 * row + 9, 9] for row in range(len(scores))])
    return Detections(
        boxes.reshape(-1, 4), torch.tensor(scores), torch.tensor(labels, dtype=torch.int64), NAMES, (50, 50)
    )


@pytest.mark.parametrize(
    ("other", "wanted"),
    [
        (detections([0.8, 0.5], [0, 1]), 0.0),
        (detections([0.8, 0.4], [0, 1]), 0.1),
        (detections([0.8, 0.5], [0, 2]), 0.5),  # another thing
        (detections([0.8, 0.5], [0, 1], shift=4.0), 0.8),  # elsewhere
        (detections([0.8], [0]), 0.5),
        (detections([], []), 0.8),
    ],
)
def test_the_difference_is_that_of_the_scores_of_the_same_things(other: Detections, wanted: float) -> None:
    one = detections([0.8, 0.5], [0, 1])
    found = difference(one, other, DetectorConfig(soft_nms_min_score=0.0, max_detections=10))
    assert found == pytest.approx(wanted)


def test_what_a_full_list_has_no_room_for_differs_by_what_it_exceeds_the_last() -> None:
    one, other = detections([0.8, 0.5], [0, 1]), detections([0.8, 0.45], [0, 2])
    assert difference(one, other, DetectorConfig(max_detections=2)) == pytest.approx(0.05)


def test_a_graph_that_differs_is_noticed(make_detector: MakeDetector) -> None:
    detector = make_detector()
    detector.set_vocabulary(vocabulary(4))
    graph = graph_of(detector, True, [], True)
    pictures = comparison_images(ExportDetectorConfig(weights="", vocabulary="", out=""), detector)
    compare = comparison(detector, graph, pictures)

    def module(inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        with torch.no_grad():
            return list(graph.module(**inputs))

    assert compare(module) < 1e-5
    assert compare(lambda inputs: module(inputs | {"alpha": inputs["alpha"] + 0.2})) > graphs.TOLERANCE


@pytest.mark.slow
def test_the_documents_example_needs_no_code_of_ours(
    detector_file: Path, world: Path, regionclip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = next((world / "images" / "val").glob("*.jpg"))
    (tmp_path / "runs" / "detector").mkdir(parents=True)
    (tmp_path / "runs" / "detector" / "model.safetensors").write_bytes(detector_file.read_bytes())
    Image.open(photo).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    page = DOCS.read_text().replace("\\\n", "")  # wrapped commands
    (command,) = re.findall(r"^regionclip (export-detector .* out=runs/exported)$", page, re.M)
    assert regionclip(*shlex.split(command))[0] == 0
    metrics = read_json("runs/exported/metrics.json")
    assert metrics["differences"]["detector.onnx"] < graphs.TOLERANCE
    (example,) = re.findall(r"```python\n(import json.*?)```", DOCS.read_text(), re.S)
    code = "import sys\n" + example.replace("score > 0.3", "score > 0")
    code += "assert not {'torch', 'regionclip'} & set(sys.modules)\n"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = {line.rsplit(" ", 5)[0] for line in ran.stdout.splitlines()}
    assert names
    assert names <= {"red umbrella", "dog"}
    assert regionclip(*shlex.split(command))[0] == 0  # it already exists


@pytest.mark.parametrize(("version", "enough"), [("2.8.0+cu128", False), ("2.9.0", True), ("2.10.1", True)])
def test_a_pytorch_that_is_too_old_is_named(
    version: str, enough: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)(version))
    config = ExportDetectorConfig(
        weights=str(tmp_path / "absent"), vocabulary="cup", out=str(tmp_path / "out")
    )
    wanted = "absent" if enough else rf"needs PyTorch 2\.9 or newer, found {re.escape(version)}"
    with pytest.raises(InputError, match=wanted):
        export_detector(config)


def test_a_clip_without_proposals_is_told_what_to_give(clip_file: Path, tmp_path: Path) -> None:
    config = ExportDetectorConfig(weights=str(clip_file), vocabulary="cup", out=str(tmp_path / "out"))
    with pytest.raises(InputError, match="has no proposal network; give one: network=FILE"):
        export_detector(config)


def test_a_second_proposal_network_is_refused(detector_file: Path, rpn_file: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    config = ExportDetectorConfig(
        weights=str(detector_file), vocabulary="cup", out=out, network=str(rpn_file)
    )
    with pytest.raises(InputError, match="has a proposal network; drop network="):
        export_detector(config)


@pytest.mark.parametrize("size", [[64], [16, 64], [64, 64, 3]])
def test_sizes_that_are_none_are_refused(size: list[int]) -> None:
    with pytest.raises(InputError, match="a height and a width of at least 32 pixels"):
        ExportDetectorConfig(weights="model.safetensors", vocabulary="cup", out="out", size=size)
