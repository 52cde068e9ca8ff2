"""RegionCLIP's model zoo: its files by name, and the configs that evaluate them as their authors did."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from clip_base.jobs import config as configs
from clip_base.models import zoo
from clip_base.models.clip import CLIP
from clip_base.runtime.errors import InputError
from clip_base.weights import infer_config
from clip_base.weights.fetching import download
from clip_base.weights.load import find
from regionclip.checkpoints.formats import recognize
from regionclip.checkpoints.load import SETTINGS
from regionclip.checkpoints.zoo import FILES
from regionclip.models.postprocess import DetectorConfig
from regionclip.structures.transforms import ResizeConfig

CONFIGS = Path(__file__).parents[3] / "configs" / "region-evaluate"


@pytest.mark.parametrize("name", ["RN50", "RN50x4"])
def test_the_shapes_in_a_file_tell_which_tower_it_holds(name: str) -> None:
    with torch.device("meta"):
        model = CLIP(zoo.config(name))
    places = {"visual": "backbone", "text": "lang_encoder"}
    state = {}
    for key, value in model.state_dict().items():
        part, _, rest = key.partition(".")
        if part in places and not key.endswith("num_batches_tracked"):
            state[f"{places[part]}.{rest}"] = value
    content = recognize(state, Path("a.pth"))
    assert content is not None
    assert content.clip is not None
    assert infer_config.infer(content.clip, infer_config.Hints(content.activation), "a.pth") == zoo.config(
        name
    )


def test_published_names_say_where_their_files_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CLIP_BASE_CACHE", str(tmp_path))
    with pytest.raises(
        InputError,
        match=r"it is missing .*; get rpn/rpn_coco_48\.pth from https://drive\..* with a browser",
    ) as told:
        find("rpn_coco_48")
    assert str(tmp_path / "rpn" / "rpn_coco_48.pth") in str(told.value)
    assert "cannot be verified" in str(told.value)
    for place in (tmp_path / "rpn_coco_48.pth", tmp_path / "rpn" / "rpn_coco_48.pth"):
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(b"x")
        assert find("rpn_coco_48") == place
    assert "its publishers give no checksum" in capsys.readouterr().err
    with pytest.raises(InputError, match="did you mean 'rpn_coco_48'"):
        download.fetch("rpn_coco_49")


def test_a_files_checksum_counts_where_one_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        FILES, "rpn_coco_48", download.Published("rpn/a.pth", sha256="0" * 64, page="https://x")
    )
    (tmp_path / "a.pth").write_bytes(b"x")
    with pytest.raises(InputError, match="is not the published file"):
        download.fetch("rpn_coco_48", tmp_path)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("published_*.yaml")), ids=lambda file: file.stem)
def test_published_rows_name_published_files_and_the_authors_settings(file: Path) -> None:
    row = yaml.safe_load(file.read_text(encoding="utf-8"))
    proposer = row.get("proposer", {"weights": "rpn_coco_48", "limit": 1000})  # true boxes need none
    assert {row["weights"], proposer["weights"], row["embeddings"]} <= set(FILES)
    settings = configs.check(DetectorConfig, row["detector"], file.name)
    resize = configs.check(ResizeConfig, row["resize"], file.name)
    assert (resize.short, resize.long, resize.filter, resize.multiple) == ([800], 1333, "bilinear", 1)
    assert (row["batch_size"], row["precision"], proposer["limit"]) == (1, "fp32", 1000)
    if "truth" in file.stem:
        assert (settings.allow_background, settings.nms_type, row["boxes"]) == (
            True,
            "nms",
            "truth_suppressed",
        )
    elif "zeroshot" in file.stem:
        assert (settings.allow_background, settings.nms_type, row["proposer"]["nms"]) == (True, "nms", 0.9)
    else:
        wanted = SETTINGS[48 if "coco" in file.stem else 866]
        for name in (
            "temperature",
            "fusion",
            "min_score",
            "soft_nms_min_score",
            "soft_nms_sigma",
            "nms_type",
            "max_detections",
            "alpha_base",
        ):
            assert getattr(settings, name) == getattr(wanted, name), name
    assert ("rn50x4" in file.stem) == row["weights"].endswith("x4") == row["embeddings"].endswith("x4")
