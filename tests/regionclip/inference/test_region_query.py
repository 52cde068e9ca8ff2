"""A region of an image as the query: one-shot search on the command line and in Python."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import regionclip as package
from clip_base.runtime.errors import InputError
from clip_base.storage.files import read_json
from regionclip.concepts.vocabulary import Vocabulary
from regionclip.inference.region_query import parse_queries, parts_beside, vocabulary_of
from regionclip.structures.transforms import ResizeConfig

Command = Callable[..., tuple[int, str]]
SHOWN, OTHER = [2.0, 2, 30, 30], [34.0, 30, 62, 62]


@pytest.fixture
def image(world: Path) -> Path:
    return min((world / "images" / "val").iterdir())


def test_a_query_is_an_image_a_box_and_maybe_a_name(image: Path) -> None:
    plain, named, again = parse_queries(f"{image}:1,2,3,4; my mug={image}:5,6,7,8;my mug={image}:0,0,9.5,9;")
    assert (plain.name, plain.image, plain.box) == (f"like {image.stem}", image, (1, 2, 3, 4))
    assert (named.name, named.box, again.box) == ("my mug", (5, 6, 7, 8), (0, 0, 9.5, 9))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat", "is not IMAGE:x1,y1,x2,y2"),
        ("{image}:1,2,3", "is not IMAGE:x1,y1,x2,y2"),
        ("{image}:1,2,3,x", "is not IMAGE:x1,y1,x2,y2"),
        ("{image}:3,2,1,4", "with 0 ≤ x1 < x2"),
        ("absent.jpg:1,2,3,4", r"query image absent\.jpg does not exist"),
        (" ; ", "names no region"),
    ],
)
def test_what_is_no_query_is_refused(text: str, message: str, image: Path) -> None:
    with pytest.raises(InputError, match=message):
        parse_queries(text.format(image=image))


def test_parts_beside_a_region_show_nearly_nothing_of_it() -> None:
    cells = parts_beside([10, 10, 30, 30], 100, 200)
    assert len(cells) > 20
    for x1, y1, x2, y2 in cells.tolist():
        common = max(min(x2, 30) - max(x1, 10), 0) * max(min(y2, 30) - max(y1, 10), 0)
        assert common < 0.1 * min((x2 - x1) * (y2 - y1), 400)


def test_the_shown_region_scores_best_in_its_own_image(clip_file: Path, image: Path) -> None:
    predictor = package.load(
        clip_file, proposer={"name": "grid"}, resize=ResizeConfig(short=[64], long=64), precision="fp32"
    )
    corners = ",".join(f"{side:g}" for side in SHOWN)
    predictor.set_vocabulary(vocabulary_of(predictor, parse_queries(f"it={image}:{corners}")))
    (names,) = predictor.classify_regions(image, [SHOWN])
    ((_, shown),) = names
    assert shown == 1  # among the names alone
    detector = predictor.detector
    features = predictor.region_features(image, [SHOWN, OTHER])
    among_all = detector.logits(features, detector._all_names(), False).softmax(1)[:, 0]
    assert float(among_all[0]) > 2 * float(among_all[1])
    assert len(detector.negatives) > 10


def test_names_of_regions_are_means_of_directions_and_survive_a_file(tmp_path: Path) -> None:
    rows = torch.tensor([[3.0, 0, 0], [0, 0.5, 0]])
    others = torch.tensor([[0.0, 0, 2]])
    made = Vocabulary.from_regions({"a": rows, "b": rows[:1]}, others)
    expected = torch.stack([F.normalize(torch.tensor([1.0, 1, 0]), dim=0), torch.tensor([1.0, 0, 0])])
    torch.testing.assert_close(made.embeddings, expected)
    made.save(tmp_path / "v.safetensors")
    read = Vocabulary.load(tmp_path / "v.safetensors")
    assert read.fingerprint == made.fingerprint != Vocabulary.from_regions({"a": rows, "b": rows}).fingerprint
    for vocabulary in (read, made.subset(["a", "b"]), made.to("cpu")):
        assert vocabulary.negatives is not None
        torch.testing.assert_close(vocabulary.negatives, torch.tensor([[0.0, 0, 1]]))
    with pytest.raises(InputError, match="'b' has none"):
        Vocabulary.from_regions({"a": rows, "b": rows[:0]})


def test_a_region_is_looked_for_on_the_command_line(
    image: Path, clip_file: Path, tmp_path: Path, regionclip: Command
) -> None:
    boxes = [{"image_id": 1, "category_id": 1, "score": 1.0, "file_name": image.name}]
    proposals = tmp_path / "boxes.json"
    proposals.write_text(
        json.dumps([boxes[0] | {"bbox": [x1, y1, x2 - x1, y2 - y1]} for x1, y1, x2, y2 in (SHOWN, OTHER)])
    )
    call = [str(image), f"weights={clip_file}", "resize.short=[64]", "resize.long=64", "precision=fp32"]
    call += ["proposer.name=precomputed", f"proposer.file={proposals}", f"out={tmp_path / 'found'}"]
    corners = ",".join(f"{side:g}" for side in SHOWN)
    code, told = regionclip("detect", *call, f"query=my mug={image}:{corners}")
    assert code == 0, told
    best = max(read_json(tmp_path / "found" / "detections.json"), key=lambda entry: entry["score"])
    assert best["category_name"] == "my mug"
    assert best["bbox"] == pytest.approx([2, 2, 28, 28], abs=0.1)
    code, told = regionclip("detect", *call, f"query={image}:{corners}", "vocabulary=cup")
    assert (code, "give either vocabulary=" in told) == (2, True)
    code, told = regionclip("detect", *call)
    assert (code, "or query=IMAGE:x1,y1,x2,y2" in told) == (2, True)


def test_texts_are_embedded_as_names_are(clip_file: Path) -> None:
    predictor = package.load(clip_file, ["cup", "star"], proposer={"name": "grid"}, precision="fp32")
    assert predictor.detector.vocabulary is not None
    torch.testing.assert_close(
        predictor.text_features(["cup", "star"]), predictor.detector.vocabulary.embeddings
    )
    assert predictor.text_features("cup").shape == (1, 32)
