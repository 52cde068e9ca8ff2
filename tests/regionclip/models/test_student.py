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
from clip_base.models.tokenizer import Tokenizer
from clip_base.runtime.errors import InputError
from clip_base.storage.files import read_json
from clip_base.weights.native import read_weights, save_clip, write_weights
from regionclip.checkpoints.load import load_detector, look_for, save_detector
from regionclip.concepts.vocabulary import Vocabulary, embed
from regionclip.export.detector_graph import DetectorGraph
from regionclip.inference.predictor import Predictor
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
        student = frozen_of(student_clip(make_clip), StudentConfig("auto", base, novel))
        found = probabilities(detector.with_student(student).eval())
        torch.testing.assert_close(found, own ** (1 - exponents) * frozen**exponents, atol=1e-5, rtol=1e-4)


def test_a_student_is_frozen_and_stays_with_the_detector(
    make_detector: Callable[..., Detector], make_clip: MakeClip
) -> None:
    student = frozen_of(student_clip(make_clip), StudentConfig("auto", 0.5, 0.5))
    detector = make_detector().with_student(student).train()
    assert not any(module.training for module in student.modules())
    assert not any(parameter.requires_grad for parameter in student.parameters())
    assert detector.network is not None
    assert detector.with_network(detector.network).student is student
    assert {name for name, _ in detector.named_parameters() if name.startswith("student.visual.")}


@pytest.mark.parametrize(("base", "novel", "named"), [(-0.1, 0.5, "base"), (0.5, 1.1, "novel")])
def test_exponents_outside_0_to_1_are_refused(base: float, novel: float, named: str) -> None:
    with pytest.raises(InputError, match=rf"student.{named} must be in \[0, 1\]"):
        StudentConfig("auto", base, novel)


def test_a_student_with_another_text_tower_is_refused(make_clip: MakeClip, tmp_path: Path) -> None:
    save_clip(make_clip(seed=5), tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="another text tower"):
        load_student(StudentConfig(str(tmp_path / "other.safetensors")), make_clip(), "per_region")


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
    assert regionclip_package.load(file, student="none").detector.student is None


def test_names_are_novel_that_a_detector_was_not_trained_on(make_detector: Callable[..., Detector]) -> None:
    rows = F.normalize(torch.randn(2, 32), dim=1)
    for base, novel in (((), [False, False]), (("cup",), [False, True])):
        detector = make_detector()
        detector.base = base
        detector.set_vocabulary(Vocabulary(("Cup_", "mug"), rows))  # spelled as a prompt reads it
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
    vocabulary, scores = Vocabulary(("a", "b", "c"), names), []
    frame, negatives = ResizeTransform((96, 128), (96, 128)), F.normalize(torch.randn(2, 32), dim=1)
    for detector in (both, both.with_student(None).eval()):
        detector.set_vocabulary(vocabulary, student_negatives=negatives)
        with torch.no_grad():
            boxes, found, labels = DetectorGraph(detector).eval()(pixels)
            scores.append(DetectorGraph(detector, suppress=False).eval()(pixels)[1])
        batch = to_batch([pixels.numpy()], detector.resize.multiple)
        wanted = detector.detect_batch(batch, [frame], [ImageInfo(0, 96, 128)])[0]
        torch.testing.assert_close(found, wanted.scores, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(boxes, wanted.boxes, atol=1e-2, rtol=1e-3)
        assert torch.equal(labels, wanted.labels)
    assert (scores[0] - scores[1]).abs().max() > 1e-3
    file = tmp_path / "detector.safetensors"
    save_detector(both, file, ["b"])
    given = (str(file), "vocabulary=a,b", "size=[64,64]")
    code, told = regionclip("export-detector", *given, "dynamic_vocabulary=true", f"out={tmp_path / 'out'}")
    assert code == 2
    assert "student.weights=none" in told


@torch.no_grad()
def test_few_words_of_a_users_own_compete_with_generic_names(
    make_detector: Callable[..., Detector], make_clip: MakeClip
) -> None:
    detector = make_detector().with_student(frozen_of(student_clip(make_clip))).eval()
    vocabulary = embed(detector.clip, Tokenizer(16), ["umbrella"])
    student, images = detector.student, ImageBatch.whole(torch.randn(2, 3, 64, 64))
    assert student is not None
    for own_words, sure in ((False, True), (True, False)):
        look_for(detector, vocabulary, ["{}"], own_words)
        names = torch.cat([detector.classifier, detector.student_negatives])
        known = student.probabilities(images, REGIONS, names)[:, 0]
        assert bool((known == 1).all()) == sure
        own = detector.with_student(None).eval()
        look_for(own, vocabulary, ["{}"], own_words)
        alone = own.classify(own.feature_maps(images), REGIONS, True)[0][:, 0]
        both = detector.classify(detector.feature_maps(images), REGIONS, True)[0][:, 0]
        torch.testing.assert_close(both, alone**0.65 * known**0.35)


@torch.no_grad()
def test_regions_that_were_shown_are_of_the_detectors_own_tower(
    make_detector: Callable[..., Detector], make_clip: MakeClip
) -> None:
    alone = make_detector().eval()
    both = alone.with_student(frozen_of(student_clip(make_clip))).eval()
    shown = Vocabulary.from_regions({"mine": torch.randn(2, 32)}, torch.randn(3, 32))
    images = ImageBatch.whole(torch.randn(2, 3, 64, 64))
    found = []
    for detector in (alone, both):
        look_for(detector, shown, ["{}"], own_words=True)
        found.append(detector.classify(detector.feature_maps(images), REGIONS, True)[0])
    assert both.student is not None
    assert not both.asks_student
    torch.testing.assert_close(found[0], found[1])


def test_the_most_probable_names_of_a_region_are_both_ones(
    make_detector: Callable[..., Detector], make_clip: MakeClip
) -> None:
    alone = make_detector().eval()
    only = StudentConfig(base=1.0, novel=1.0)
    both = alone.with_student(frozen_of(student_clip(make_clip), only)).eval()
    frozen = Detector(student_clip(make_clip), DetectorConfig()).eval()
    image, box, found = torch.rand(3, 64, 64), [[5.0, 5, 50, 60]], []
    for detector in (both, frozen, alone):
        predictor = Predictor(detector, None, "fp32")
        rows = F.normalize(torch.randn(3, 32, generator=torch.Generator().manual_seed(2)), dim=1)
        detector.set_vocabulary(Vocabulary(("a", "b", "c"), rows))
        found.append(dict(predictor.classify_regions(image, box)[0]))
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert found[0] != pytest.approx(found[2], abs=1e-3)
    assert sum(found[0].values()) == pytest.approx(1)


def test_a_damaged_student_is_told(
    make_detector: Callable[..., Detector], make_clip: MakeClip, tmp_path: Path
) -> None:
    file = tmp_path / "detector.safetensors"
    save_detector(make_detector().with_student(frozen_of(student_clip(make_clip))), file, [])
    weights, metadata = read_weights(file)
    write_weights(tmp_path / "head.safetensors", weights, {**metadata, "student_region_head": "round"})
    with pytest.raises(InputError, match="region_head='round'"):
        load_detector(str(tmp_path / "head.safetensors"))
    for lacking in ("clip.logit_scale", "student.visual.conv1.weight"):
        some = {name: value for name, value in weights.items() if name != lacking}
        write_weights(tmp_path / "lacking.safetensors", some, metadata)
        with pytest.raises(InputError, match=lacking.rpartition(".")[2]):
            load_detector(str(tmp_path / "lacking.safetensors"))
    with pytest.raises(InputError, match="give auto, none or a file"):
        StudentConfig("")


def test_students_are_not_mixed_by_interpolation(
    make_detector: Callable[..., Detector], make_clip: MakeClip, regionclip: Command, tmp_path: Path
) -> None:
    plain = make_detector()
    both = plain.with_student(frozen_of(student_clip(make_clip)))
    other = plain.with_student(frozen_of(make_clip()))
    files = {name: tmp_path / f"{name}.safetensors" for name in ("plain", "both", "other", "same")}
    for name, detector in (("plain", plain), ("both", both), ("other", other), ("same", both)):
        save_detector(detector, files[name], [])
    for second, expected in (("plain", 2), ("other", 2), ("same", 0)):
        given = (f"first={files['both']}", f"second={files[second]}", f"out={tmp_path / 'mixed.safetensors'}")
        code, told = regionclip("interpolate", *given)
        assert code == expected, told
        assert ("different students" in told) == bool(expected)
    mixed, before = (read_weights(path)[0] for path in (tmp_path / "mixed.safetensors", files["both"]))
    assert all(torch.equal(mixed[name], before[name]) for name in before if name.startswith("student."))


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
