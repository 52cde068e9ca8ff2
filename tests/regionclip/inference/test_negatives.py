"""A zero-shot score says how well a name fits, not only how well among the names that were asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import regionclip
from clip_base.jobs.cli import main_regionclip
from clip_base.storage.files import read_json
from regionclip.concepts.negatives import groups, negatives_beside
from regionclip.inference.predictor import Predictor
from regionclip.models.postprocess import DetectorConfig
from regionclip.structures.transforms import ResizeConfig


def predictor(clip_file: Path, names: list[str], negatives: str = "auto") -> Predictor:
    small = ResizeConfig(short=[64], long=96)
    config = DetectorConfig(negatives=negatives)
    return regionclip.load(
        clip_file,
        names,
        proposer={"name": "grid"},
        resize=small,
        config=config,
        precision="fp32",
        multi_label=True,
    )


def test_one_absurd_name_over_an_image_yields_nearly_nothing(clip_file: Path, world: Path) -> None:
    image = min((world / "images" / "val").iterdir())
    found = predictor(clip_file, ["xylophone of a hippopotamus"]).detect(image)
    assert len(found.with_min_score(0.3)) == 0
    published = predictor(clip_file, ["xylophone of a hippopotamus"], "none").detect(image)
    assert float(published.scores.max()) == pytest.approx(1)


def test_a_score_hardly_depends_on_how_many_names_are_asked_for(clip_file: Path, world: Path) -> None:
    image = min((world / "images" / "val").iterdir())
    names = ["cup", "star", "gear", "umbrella", "skull"]

    def best_cup(count: int, negatives: str) -> float:
        found = predictor(clip_file, names[:count], negatives).detect(image)
        return float(found.scores[found.labels == 0].max())

    assert best_cup(5, "auto") / best_cup(1, "auto") > 0.8
    assert best_cup(5, "none") / best_cup(1, "none") < 0.8


def test_evaluation_and_trained_detectors_are_left_as_published(
    clip_file: Path, detector_file: Path, world: Path, tmp_path: Path
) -> None:
    assert len(regionclip.load(detector_file, ["cup"]).detector.negatives) == 0
    assert len(predictor(clip_file, ["cup"]).detector.negatives) > 50
    figures: dict[str, Any] = {}
    for kind in ("auto", "none", "generic"):
        options = [f"annotations={world / 'instances_val.json'}", f"images={world / 'images'}"]
        options += [f"weights={clip_file}", "boxes=truth", "resize.short=[64]", "resize.long=96"]
        out = tmp_path / kind
        assert main_regionclip(["evaluate", *options, f"detector.negatives={kind}", f"out={out}"]) == 0
        figures[kind] = read_json(out / "results.json")
    assert figures["auto"] == figures["none"]
    assert figures["generic"] != figures["none"]


@pytest.mark.parametrize(
    ("names", "gone"),
    [
        (["animal"], {"dog", "cat", "bird", "horse", "cow", "sheep", "fish", "insect"}),
        (["hot dogs"], {"dog"}),
        (["wine bottle"], {"bottle"}),
        (["Trees"], {"tree"}),
        (["glass"], {"glass"}),
    ],
)
def test_a_negative_is_no_rival_of_what_it_means_itself(names: list[str], gone: set[str]) -> None:
    every = {word for words in groups().values() for word in words}
    assert every - set(negatives_beside(names)) == gone


def test_no_negative_stands_twice() -> None:
    every = [word for words in groups().values() for word in words]
    twice = {word for word in every if every.count(word) > 1}
    assert not twice
