"""Files say which region head their weights were trained with, and whoever reads them keeps to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clip_base.jobs.cli import main
from clip_base.models.clip import CLIP
from clip_base.runtime.errors import InputError
from clip_base.storage.files import read_json
from clip_base.weights.native import read_metadata, read_weights, save_clip, write_weights
from regionclip.checkpoints.load import load_detector, read_detector_file, save_detector
from regionclip.mining.shards import read_manifest, read_regions
from regionclip.models.detector import Detector
from regionclip.models.region_heads import KEY, choose_head

Command = Callable[..., tuple[int, str]]
Swap = Callable[..., list[str]]
SIZE = ["resize.short=[64]", "resize.long=64"]
TRAINING = ["train.steps=2", "train.batch_size=4", "train.warmup_steps=0", "train.precision=fp32"]


@pytest.fixture
def shared_file(make_clip: Callable[..., CLIP], tmp_path: Path) -> Path:
    """A CLIP whose file says that it was trained with the shared head."""
    path = tmp_path / "shared.safetensors"
    save_clip(make_clip(), path, {KEY: "shared"})
    return path


@pytest.fixture
def shared_detector(make_detector: Callable[..., Detector], tmp_path: Path) -> Path:
    """A detector with the shared head."""
    plain = make_detector()
    parts = (plain.network, plain.box_head, plain.background)
    detector = Detector(plain.clip, plain.config, *parts, region_head="shared")
    save_detector(detector, tmp_path / "detector.safetensors", ["cup"])
    return tmp_path / "detector.safetensors"


def test_the_head_goes_from_mining_to_the_detector(
    mining_options: list[str], world: Path, rpn_file: Path, tmp_path: Path, regionclip: Command, swapped: Swap
) -> None:
    mined, student, detector = (tmp_path / name for name in ("mined", "student", "detector"))
    options = swapped(mining_options, teacher="roi_align", region_head="shared")
    assert regionclip("mine", *options, f"out={mined}")[0] == 0
    assert read_manifest(mined)[KEY] == "shared"
    clip = next(option for option in mining_options if option.startswith("weights="))
    common = [f"mined={mined}", clip, *SIZE, *TRAINING, "region_head=shared", "max_regions=4"]
    assert regionclip("pretrain", *common, clip.replace("weights", "teacher"), f"out={student}")[0] == 0
    weights = student / "model.safetensors"
    assert read_metadata(weights)[KEY] == "shared"
    data = [f"annotations={world / 'instances_train.json'}", f"images={world / 'images'}", *SIZE, *TRAINING]
    data += [f"split={world / 'split.json'}", f"weights={weights}", f"rpn={rpn_file}"]
    assert regionclip("train-detector", *data, "rois_per_image=8", f"out={detector}")[0] == 0
    assert read_detector_file(detector / "model.safetensors")[0].encoder.region_head == "shared"
    loss = read_json(detector / "metrics.json")["loss"]
    assert loss == loss


def test_a_shared_teacher_mines_other_pairs(
    mining_options: list[str], tmp_path: Path, regionclip: Command, swapped: Swap
) -> None:
    found = []
    for head in ("per_region", "shared"):
        options = swapped(mining_options, teacher="roi_align", region_head=head)
        assert regionclip("mine", *options, f"out={tmp_path / head}")[0] == 0
        found.append([region.concept_probs for region in read_regions(tmp_path / head)])
    assert found[0] != found[1]


def test_a_file_decides_where_nothing_is_said(shared_file: Path, clip_file: Path) -> None:
    assert load_detector(str(shared_file)).encoder.region_head == "shared"
    assert load_detector(str(clip_file)).encoder.region_head == "per_region"
    assert load_detector(str(clip_file), region_head="shared").encoder.region_head == "shared"


def test_another_head_than_the_files_is_refused(
    shared_file: Path, shared_detector: Path, mining_options: list[str], regionclip: Command, swapped: Swap
) -> None:
    for path in (shared_file, shared_detector):
        with pytest.raises(InputError, match="was trained with region_head=shared; region_head=per_region"):
            load_detector(str(path), region_head="per_region")
    options = swapped(mining_options, teacher="roi_align", region_head="per_region", weights=shared_file)
    code, told = regionclip("mine", *options, f"out={shared_file.parent / 'mined'}")
    assert code == 2
    assert "was trained with region_head=shared" in told
    assert not (shared_file.parent / "mined" / "vocabulary.safetensors").exists()
    with pytest.raises(InputError, match="region_head=both is not one of auto, per_region, shared"):
        choose_head("both", str(shared_file))


def test_a_head_for_a_teacher_that_has_none_is_refused(
    mining_options: list[str], tmp_path: Path, regionclip: Command
) -> None:
    code, told = regionclip("mine", *mining_options, "region_head=shared", f"out={tmp_path / 'mined'}")
    assert code == 2
    assert "region_head=shared is for teacher=roi_align, this is teacher=crop" in told


def test_detectors_of_earlier_versions_have_the_published_head(
    detector_file: Path, shared_detector: Path
) -> None:
    weights, metadata = read_weights(shared_detector)
    assert metadata.pop(KEY) == "shared"
    write_weights(shared_detector, weights, metadata)
    for path in (detector_file, shared_detector):
        assert read_detector_file(path)[0].encoder.region_head == "per_region"


def test_mixed_weights_keep_their_head(
    shared_file: Path, shared_detector: Path, detector_file: Path, clip_file: Path, regionclip: Command
) -> None:
    out = shared_file.parent / "mixed.safetensors"
    assert regionclip("interpolate", f"first={clip_file}", f"second={shared_file}", f"out={out}")[0] == 0
    assert read_metadata(out)[KEY] == "shared"
    command = ["interpolate", f"first={clip_file}", f"second={shared_detector}", "part=clip", f"out={out}"]
    assert regionclip(*command)[0] == 0
    assert read_metadata(out)[KEY] == "shared"
    code, told = regionclip(
        "interpolate", f"first={shared_detector}", f"second={detector_file}", f"out={out}"
    )
    assert code == 2
    assert "only models of one region head can be mixed" in told


def test_converted_weights_keep_their_head_or_are_refused(
    shared_file: Path, shared_detector: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shared_file.parent
    out = folder / "copy.safetensors"
    assert main(["convert", str(shared_file), "to=native", f"out={out}"]) == 0
    assert read_metadata(out)[KEY] == "shared"
    for path in (shared_file, shared_detector):
        assert main(["convert", str(path), "to=regionclip", f"out={folder / 'theirs.pth'}"]) == 2
        assert "was trained with region_head=shared" in capsys.readouterr().err


def test_regionclips_weights_are_refused_by_the_shared_head(
    make_clip: Callable[..., CLIP], tmp_path: Path
) -> None:
    model = make_clip()
    state = {f"backbone.{name}": value for name, value in model.visual.state_dict().items()}
    state |= {f"lang_encoder.{name}": value for name, value in model.text.state_dict().items()}
    torch.save({"model": state}, tmp_path / "regionclip.pth")
    assert choose_head("auto", str(tmp_path / "regionclip.pth")) == "per_region"
    with pytest.raises(InputError, match="was trained with region_head=per_region"):
        choose_head("shared", str(tmp_path / "regionclip.pth"))
