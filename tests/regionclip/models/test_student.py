"""A frozen CLIP beside a detector: probabilities are their geometric mean, with exponents by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clip_base.data.batch import ImageBatch
from clip_base.models.clip import CLIP
from clip_base.runtime.errors import InputError
from clip_base.storage.files import read_json
from clip_base.weights.native import save_clip
from regionclip.concepts.vocabulary import Vocabulary
from regionclip.models.detector import Detector
from regionclip.models.postprocess import DetectorConfig
from regionclip.models.student import FrozenStudent, StudentConfig, load_student
from regionclip.structures.regions import Regions

Command = Callable[..., tuple[int, str]]
MakeClip = Callable[..., CLIP]
NOVEL = torch.tensor([False, True, False])
REGIONS = Regions(torch.tensor([[0.0, 0, 30, 30], [10, 20, 60, 50], [5, 5, 64, 64]]), torch.tensor([0, 0, 1]))


def student_clip(make_clip: MakeClip) -> CLIP:
    """Another vision tower beside the same text tower."""
    clip, other = make_clip(), make_clip(seed=5)
    clip.visual.load_state_dict(other.visual.state_dict())
    return clip


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
        student = FrozenStudent(student_clip(make_clip), StudentConfig("", base, novel))
        found = probabilities(detector.with_student(student).eval())
        torch.testing.assert_close(found, own ** (1 - exponents) * frozen**exponents, atol=1e-5, rtol=1e-4)


def test_a_student_is_frozen_and_stays_with_the_detector(
    make_detector: Callable[..., Detector], make_clip: MakeClip
) -> None:
    student = FrozenStudent(student_clip(make_clip), StudentConfig("", 0.5, 0.5))
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
