"""A frozen CLIP beside a detector: probabilities are their geometric mean, with exponents by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regionclip as regionclip_package
from clip_base.data.batch import ImageBatch
from clip_base.models.clip import CLIP
from clip_base.runtime.errors import InputError
from clip_base.storage.files import read_json
from clip_base.weights.native import save_clip
from regionclip.checkpoints.load import load_detector, save_detector
from regionclip.concepts.vocabulary import Vocabulary
from regionclip.export.detector_graph import DetectorGraph
from regionclip.models.detector import Detector
from regionclip.models.postprocess import DetectorConfig
from regionclip.models.student import FrozenStudent, StudentConfig, load_student
from regionclip.structures.regions import ImageInfo, Regions
from regionclip.structures.transforms import ResizeTransform, to_batch

Command = Callable[..., tuple[int, str]]
MakeClip = Callable[..., CLIP]
NOVEL = torch.tensor([False, True, False])
REGIONS = Regions(torch.tensor([[0.0, 0, 30, 30], [10, 20, 60, 50], [5, 5, 64, 64]]), torch.tensor([0, 0, 1]))


def student_clip(make_clip: MakeClip) -> CLIP:
    """Another vision tower beside the same text tower."""
    clip, other = make_clip(), make_clip(seed=5)
    clip.visual.load_state_dict(other.visual.state_dict())
    return clip


def frozen_of(clip: CLIP, config: StudentConfig | None = None) -> FrozenStudent:
    return FrozenStudent(clip.visual, float(clip.logit_scale.detach().exp()), config)


def probabilities(detector: Detector) -> Tensor:
    names = F.normalize(torch.randn(3, 32, generator=torch.Generator().manual_seed(2)), dim=1)
    detector.set_vocabulary(Vocabulary(("a", "b", "c"), names, NOVEL, {}))
    images = ImageBatch.whole(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    return detector.classify(detector.feature_maps(images), REGIONS, detector.trained)[0]


@torch.no_grad()
def test_both_probabilities_are_multiplied_with_exponents_by_name(
    make_detector: Callable[..., Detector], make_clip: MakeClip
) -> None:
    detector, clip = make_detector(), student_clip(make_clip)
    own, frozen = probabilities(detector), probabilities(Detector(clip, DetectorConfig()).eval())
    assert (own - frozen).abs().max() > 0.01
    for base, novel in ((0.35, 0.65), (0.0, 1.0), (1.0, 0.0)):
        exponents = torch.where(NOVEL, novel, base)
        student = frozen_of(student_clip(make_clip), StudentConfig("", base, novel))
        found = probabilities(detector.with_student(student).eval())
        torch.testing.assert_close(found, own ** (1 - exponents) * frozen**exponents, atol=1e-5, rtol=1e-4)


def test_a_student_is_frozen_and_stays_with_the_detector(
    make_detector: Callable[..., Detector], make_clip: MakeClip
) -> None:
    student = frozen_of(student_clip(make_clip), StudentConfig("", 0.5, 0.5))
    detector = make_detector().with_student(student).train()
    assert not any(module.training for module in student.modules())
    assert not any(parameter.requires_grad for parameter in student.parameters())
    assert detector.network is not None
    assert detector.with_network(detector.network).student is student
    assert {name for name, _ in detector.named_parameters() if name.startswith("student.visual.")}


@pytest.mark.parametrize(("base", "novel", "named"), [(-0.1, 0.5, "base"), (0.5, 1.1, "novel")])
def test_exponents_outside_0_to_1_are_refused(base: float, novel: float, named: str) -> None:
    with pytest.raises(InputError, match=rf"student.{named} must be in \[0, 1\]"):
        StudentConfig("", base, novel)


def test_a_student_with_another_text_tower_is_refused(make_clip: MakeClip, tmp_path: Path) -> None:
    save_clip(make_clip(seed=5), tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="another text tower"):
        load_student(StudentConfig(str(tmp_path / "other.safetensors")), make_clip())


def test_a_file_keeps_the_student_and_takes_it_unless_told_otherwise(
    make_detector: Callable[..., Detector], make_clip: MakeClip, tmp_path: Path
) -> None:
    alone = make_detector().eval()
    both = alone.with_student(frozen_of(student_clip(make_clip))).eval()
    file = tmp_path / "detector.safetensors"
    save_detector(both, file, ["a", "c"])
    found = load_detector(str(file))
    assert found.base == ("a", "c")
    torch.testing.assert_close(probabilities(found), probabilities(both))
    without = load_detector(str(file), student=StudentConfig("none"))
    torch.testing.assert_close(probabilities(without), probabilities(alone))
    assert (probabilities(found) - probabilities(without)).abs().max() > 0.01
    other = StudentConfig(base=1.0, novel=1.0)
    only = load_detector(str(file), student=other)
    frozen = probabilities(Detector(student_clip(make_clip), DetectorConfig()).eval())
    torch.testing.assert_close(probabilities(only), frozen, atol=1e-5, rtol=1e-4)
    predictor = regionclip_package.load(file, vocabulary=["a", "b"])
    assert predictor.detector.student is not None
    assert predictor.detector.novel.tolist() == [False, True]


def test_names_are_novel_that_a_detector_was_not_trained_on(make_detector: Callable[..., Detector]) -> None:
    rows = F.normalize(torch.randn(2, 32), dim=1)
    for base, novel in (((), [False, False]), (("cup",), [False, True])):
        detector = make_detector()
        detector.base = base
        detector.set_vocabulary(Vocabulary(("cup", "mug"), rows))
        assert detector.novel.tolist() == novel
        detector.set_vocabulary(Vocabulary(("cup", "mug"), rows, torch.tensor([True, True]), {}))
        assert detector.novel.tolist() == [True, True]


def test_a_graph_has_the_student_too(
    make_detector: Callable[..., Detector], make_clip: MakeClip, tmp_path: Path, regionclip: Command
) -> None:
    both = make_detector().with_student(frozen_of(student_clip(make_clip))).eval()
    both.base = ("b",)
    seeded = torch.Generator().manual_seed(2)
    names = F.normalize(torch.randn(3, 32, generator=seeded), dim=1)
    pixels = torch.randint(0, 256, (96, 128, 3), dtype=torch.uint8, generator=seeded)
    scores = []
    for detector in (both, both.with_student(None).eval()):
        detector.set_vocabulary(Vocabulary(("a", "b", "c"), names))
        graph = DetectorGraph(detector).eval()
        with torch.no_grad():
            boxes, found, labels = graph(pixels)
        frame = ResizeTransform((96, 128), (96, 128))
        batch = to_batch([pixels.numpy()], detector.resize.multiple)
        wanted = detector.detect_batch(batch, [frame], [ImageInfo(0, 96, 128)])[0]
        torch.testing.assert_close(found, wanted.scores, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(boxes, wanted.boxes, atol=1e-2, rtol=1e-3)
        assert torch.equal(labels, wanted.labels)
        scores.append(found)
    assert scores[0].shape != scores[1].shape or (scores[0] - scores[1]).abs().max() > 1e-3
    file = tmp_path / "detector.safetensors"
    save_detector(both, file, ["b"])
    given = (str(file), "vocabulary=a,b", "size=[64,64]")
    code, told = regionclip("export-detector", *given, "dynamic_vocabulary=true", f"out={tmp_path / 'out'}")
    assert code == 2
    assert "student.weights=none" in told


def test_an_evaluation_takes_a_student(
    world: Path, detector_file: Path, clip_file: Path, regionclip: Command, tmp_path: Path
) -> None:
    own = [
        f"annotations={world / 'instances_val.json'}",
        f"images={world / 'images'}",
        f"split={world / 'split.json'}",
    ]
    given = (*own, f"weights={detector_file}", "boxes=truth", "precision=fp32", "report=false")
    student = (f"student.weights={clip_file}", "student.base=0.5", "student.novel=1")
    results = []
    for name, more in (("alone", ()), ("with", student)):
        code, told = regionclip("evaluate", *given, *more, f"out={tmp_path / name}")
        assert code == 0, told
        results.append(read_json(tmp_path / name / "results.json"))
    assert results[0] != results[1]
    code, told = regionclip("evaluate", own[0], "results=r.json", student[0], f"out={tmp_path / 'none'}")
    assert code == 2
    assert "student.weights= is combined with weights=" in told
