"""Configs of the synthetic dataset for detectron2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from regionclip.models.postprocess import DetectorConfig

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "configs" / "detectron2"
SMALL = {
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 20,
    "INPUT.MIN_SIZE_TRAIN": (64,),
    "INPUT.MAX_SIZE_TRAIN": 64,
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.MAX_SIZE_TEST": 64,
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 4,
}

MakeCfg = Callable[..., Any]


@pytest.fixture
def datasets(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of detectron2's datasets, with the world in it."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(world.parent))
    return world.parent


@pytest.fixture
def make_cfg(datasets: Path) -> MakeCfg:
    """Makes the shipped config of the world for tiny models: make_cfg(WEIGHTS, {KEY: value})."""
    pytest.importorskip("detectron2")
    from detectron2.config import get_cfg

    from regionclip.detectron2.catalog import register_listed
    from regionclip.detectron2.config import add_regionclip_config

    def make(weights: Path, changes: dict[str, Any] | None = None) -> Any:
        cfg = get_cfg()
        add_regionclip_config(cfg)
        cfg.merge_from_file(str(CONFIGS / "world" / "small.yaml"))
        changes = {**SMALL, "MODEL.REGIONCLIP.WEIGHTS": str(weights), **(changes or {})}
        cfg.merge_from_list([item for pair in changes.items() for item in pair])
        for name, dataset in cfg.DATASETS.OPEN_VOCABULARY.items():
            register_listed(name, **{key.lower(): value for key, value in dataset.items()})
        return cfg

    return make


@pytest.fixture
def settings() -> dict[str, Any]:
    """What the shipped config of the world makes of detectron2's keys."""
    return {
        "max_proposals": 20,
        "proposal_nms": 0.7,
        "min_score": DetectorConfig().min_score,
        "max_detections": 100,
    }
