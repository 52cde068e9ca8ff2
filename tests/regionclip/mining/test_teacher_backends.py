"""Mining with another package's teacher, and what a student may learn of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clip_base.jobs.cli import main, main_regionclip
from clip_base.models.clip import CLIP, ImageTower
from clip_base.runtime.errors import InputError
from clip_base.storage.files import read_json
from clip_base.weights.load import load_clip
from clip_base.weights.native import read_weights, save_clip
from regionclip.checkpoints.load import load_detector
from regionclip.concepts.vocabulary import Vocabulary
from regionclip.mining.matchers.base import MatchInputs
from regionclip.mining.matchers.pool import PoolConfig, PoolMatcher
from regionclip.mining.shards import read_manifest
from regionclip.training.text_space import is_of

Command = Callable[..., tuple[int, str]]
Swap = Callable[..., list[str]]

PAGE = Path(__file__).parents[3] / "docs" / "teachers.md"
SMALL = ("resize.short=[64]", "resize.long=64", "train.batch_size=4", "train.warmup_steps=0")
PRETRAIN = (*SMALL, "freeze_stages=0", "max_regions=4", "train.steps=2", "train.precision=fp32")


@pytest.fixture(scope="module")
def colors(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page's example of a teacher, as an import path."""
    block = re.search(r'^```python title="(color_teacher\.py)"\n(.*?)^```$', PAGE.read_text(), re.M | re.S)
    assert block is not None
    folder = tmp_path_factory.mktemp("plugin")
    (folder / block[1]).write_text(block[2])
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield "color_teacher:ColorTeacher"  # type: ignore[misc]


@pytest.fixture(scope="module")
def mined(
    colors: str, mining_options: list[str], swapped: Swap, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The world, mined with that teacher."""
    folder = tmp_path_factory.mktemp("mined") / "colors"
    given = swapped(mining_options, weights="none", teacher="dense", out=folder)
    assert main_regionclip(["mine", *given, f"backend.name={colors}", "backend.sharpness=30"]) == 0
    return folder


def test_a_teacher_of_ones_own_mines_with_its_own_texts_and_score(mined: Path, colors: str) -> None:
    manifest = read_manifest(mined)
    assert manifest["config"]["backend"] == {"name": colors, "sharpness": 30.0}
    assert manifest["teacher"] == f"{colors}: none (sharpness=30.0)"
    assert manifest["regions"] > 0
    assert Vocabulary.load(mined / "vocabulary.safetensors").width == 3


def test_a_student_keeps_its_text_tower_when_the_teachers_space_is_another(
    mined: Path, clip_file: Path, tmp_path: Path, regionclip: Command
) -> None:
    out = tmp_path / "student"
    code, told = regionclip("pretrain", f"mined={mined}", f"weights={clip_file}", *PRETRAIN, f"out={out}")
    assert code == 0, told
    assert "embeds their names anew" in told
    student, start = load_clip(out / "model.safetensors"), load_clip(clip_file)
    assert torch.equal(student.text.text_projection, start.text.text_projection)
    assert not torch.equal(student.visual.conv1.weight, start.visual.conv1.weight)  # type: ignore[arg-type]
    assert read_weights(out / "model.safetensors")[1]["trained_at"] == "64"


def test_the_online_teacher_of_another_package_gives_a_distillation(
    mined: Path, clip_file: Path, tmp_path: Path, regionclip: Command
) -> None:
    options = (f"mined={mined}", f"weights={clip_file}", *PRETRAIN)
    code, told = regionclip("pretrain", *options, "teacher=none", "train.steps=1", f"out={tmp_path / 'a'}")
    assert code == 0, told
    code, told = regionclip("pretrain", *options, "teacher=other", f"out={tmp_path / 'b'}")
    assert (code, "not the file used for mining" in told) == (2, True), told


def test_a_student_in_the_teachers_space_detects_by_the_teachers_embeddings(
    mined: Path,
    colors: str,
    world: Path,
    clip_file: Path,
    rpn_file: Path,
    tmp_path: Path,
    regionclip: Command,
) -> None:
    taught = ("text_embeddings=teacher", "image_text=0")
    student, names = tmp_path / "student" / "model.safetensors", tmp_path / "names.safetensors"
    options = (f"mined={mined}", f"weights={clip_file}", *PRETRAIN, *taught)
    code, told = regionclip("pretrain", *options, f"out={student.parent}")
    assert code == 0, told
    model = load_clip(student)
    assert isinstance(model, ImageTower)
    assert model.config.embed_dim == model.encode_image(torch.zeros(1, 3, 64, 64)).shape[1] == 3
    assert not any(key.startswith("text.") for key in model.state_dict())
    assert main(["inspect", str(student)]) == 0

    annotations = f"annotations={world / 'instances_train.json'}"
    boxes = (annotations, f"images={world / 'images'}", f"split={world / 'split.json'}")
    training = (*boxes, f"weights={student}", f"rpn={rpn_file}", *SMALL, "rois_per_image=8", "train.steps=1")
    code, told = regionclip("train-detector", *training, f"out={tmp_path / 'without'}")
    assert (code, "no text tower" in told) == (2, True), told
    code, told = regionclip(
        "embed",
        f"vocabulary={world / 'instances_train.json'}",
        "weights=none",
        f"backend.name={colors}",
        f"out={names}",
    )
    assert code == 0, told
    detector = tmp_path / "detector" / "model.safetensors"
    code, told = regionclip(
        "train-detector", *training, f"embeddings={names}", "max_proposals=8", f"out={detector.parent}"
    )
    assert code == 0, told
    whole = (f"weights={detector}", f"embeddings={names}", f"out={tmp_path / 'evaluation'}")
    code, told = regionclip("evaluate", *boxes, *whole, "report=false", "proposer.name=none")
    assert code == 0, told
    assert "AP50_novel" in read_json(tmp_path / "evaluation" / "metrics.json")


def test_text_weights_complete_a_clip_without_a_text_tower(
    make_clip: Callable[..., CLIP], clip_file: Path, tmp_path: Path
) -> None:
    clip = make_clip()
    alone = tmp_path / "alone.safetensors"
    save_clip(ImageTower.of(clip, clip.config), alone)
    whole = load_detector(str(alone), text_weights=str(clip_file)).clip
    tokens = torch.tensor([[1, 2, 3] + [0] * 21])
    torch.testing.assert_close(whole.encode_text(tokens), clip.encode_text(tokens))
    assert torch.equal(whole.visual.conv1.weight, clip.visual.conv1.weight)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="already has a text tower"):
        load_detector(str(clip_file), text_weights=str(clip_file))
    with pytest.raises(InputError, match="no text tower"):
        load_clip(alone).encode_text(tokens)
    assert not hasattr(load_clip(alone), "text")  # as parts ask that export or train a detector
    assert main(["convert", str(alone), "to=open_clip", f"out={tmp_path / 'x.pt'}"]) == 2


def test_a_vocabulary_is_known_as_a_text_towers_own(make_clip: Callable[..., CLIP]) -> None:
    from clip_base.models.tokenizer import Tokenizer
    from regionclip.concepts.vocabulary import embed

    clip, other = make_clip(), make_clip(seed=1)
    own = embed(clip, Tokenizer(24), ["cat", "dog", "red umbrella"])
    assert is_of(clip, own)
    assert not is_of(other, own)


def test_the_pool_matcher_takes_a_sigmoid_of_a_teacher_with_a_bias() -> None:
    cosines = torch.tensor([[0.9, 0.1], [0.3, 0.1]])
    boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 5, 5]])
    matcher = PoolMatcher(PoolConfig(min_probability=0.5, keep_all_if_none=False), ["a", "b"])

    def kept(bias: float | None) -> list[int]:
        none = torch.zeros(0, dtype=torch.int64)
        return matcher(MatchInputs(cosines, torch.ones(2), none, 0.1, boxes, bias)).indices.tolist()

    assert kept(None) == [0, 1]  # both are better than the other concept
    assert kept(-6.0) == [0]  # the second is probably neither


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("backend.name=open_cilp",), "did you mean"),
        (("backend.model=RN50",), "backend"),
        (("teacher_scale=half",), "number or auto"),
    ],
)
def test_faults_of_a_teacher_are_told_at_once(
    options: tuple[str, ...], words: str, mining_options: list[str], tmp_path: Path, regionclip: Command
) -> None:
    code, told = regionclip("mine", *mining_options, *options, f"out={tmp_path / 'mined'}")
    assert (code, words in told) == (2, True), told


def test_weights_between_two_clips_without_text_towers_have_none(
    make_clip: Callable[..., CLIP], tmp_path: Path
) -> None:
    for seed in (0, 1):
        clip = make_clip(seed=seed)
        save_clip(ImageTower.of(clip, clip.config), tmp_path / f"{seed}.safetensors")
    ends = (f"first={tmp_path / '0.safetensors'}", f"second={tmp_path / '1.safetensors'}", "alpha=[0.5]")
    for part in ("all", "clip"):
        out = tmp_path / f"{part}.safetensors"
        assert main_regionclip(["interpolate", *ends, f"part={part}", f"out={out}"]) == 0
        assert isinstance(load_clip(out), ImageTower)
