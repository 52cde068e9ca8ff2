"""Training, evaluation and resuming as detectron2's users start them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clip_base.storage.files import read_json
from regionclip.checkpoints.load import read_detector_file
from regionclip.models.postprocess import DetectorConfig
from regionclip.training.train_detector import TrainDetectorConfig

pytest.importorskip("detectron2")

from detectron2 import model_zoo
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup
from detectron2.evaluation import COCOEvaluator

from regionclip.detectron2 import training
from regionclip.detectron2.config import (
    DETECTOR_KEYS,
    TRAINING_KEYS,
    add_regionclip_config,
    detector_config,
    training_config,
)

Command = Callable[..., tuple[int, str]]
ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "configs" / "detectron2"
YAML = CONFIGS / "world" / "small.yaml"
OPTIONS = {
    "MODEL.RPN.POST_NMS_TOPK_TEST": "20",
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": "20",
    "INPUT.MIN_SIZE_TRAIN": "(64,)",
    "INPUT.MAX_SIZE_TRAIN": "64",
    "INPUT.MIN_SIZE_TEST": "64",
    "INPUT.MAX_SIZE_TEST": "64",
    "DATALOADER.NUM_WORKERS": "0",
    "SOLVER.IMS_PER_BATCH": "2",
    "SOLVER.CHECKPOINT_PERIOD": "2",
    "SEED": "1",
}


def start(*arguments: str, **options: str) -> Any:
    """Does what tools/train_net.py does with these arguments."""
    given = {**OPTIONS, **{key.replace("__", "."): value for key, value in options.items()}}
    line = [*arguments, "--config-file", str(YAML), *(item for pair in given.items() for item in pair)]
    return training.main(default_argument_parser().parse_args(line))


def sources(clip_file: Path, rpn_file: Path, out: Path) -> dict[str, str]:
    return {
        "MODEL__REGIONCLIP__WEIGHTS": str(clip_file),
        "MODEL__REGIONCLIP__RPN": str(rpn_file),
        "OUTPUT_DIR": str(out),
    }


def test_it_trains_resumes_and_evaluates(
    clip_file: Path, rpn_file: Path, datasets: Path, world: Path, regionclip: Command, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    given = sources(clip_file, rpn_file, out)
    start(**given, SOLVER__MAX_ITER="2")
    first = read_detector_file(out / "model.safetensors")[0]
    assert (out / "last_checkpoint").read_text() == "model_final.pth"
    (out / "model_0000001.pth").unlink()
    start("--resume", **given, SOLVER__MAX_ITER="4")
    assert (out / "model_0000003.pth").exists()
    assert not (out / "model_0000001.pth").exists()  # the first two steps were not made again
    detector, base = read_detector_file(out / "model.safetensors")
    assert base == tuple(read_json(world / "split.json")["base"])
    assert detector.resize is not None
    assert detector.resize.short == [64]
    moved = {
        key
        for key, value in detector.state_dict().items()
        if value.is_floating_point() and not value.equal(first.state_dict()[key])
    }
    assert any(key.startswith("clip.visual.layer3") for key in moved)
    assert any(key.startswith("box_head.") for key in moved)
    assert not any(key.startswith(("clip.text", "network", "clip.visual.layer1")) for key in moved)

    given["MODEL__REGIONCLIP__WEIGHTS"], given["MODEL__REGIONCLIP__RPN"] = str(out / "model.safetensors"), ""
    found = start("--eval-only", **{**given, "OUTPUT_DIR": str(tmp_path / "eval")})["bbox"]
    code, told = regionclip(
        "evaluate",
        f"annotations={world / 'instances_val.json'}",
        f"images={world / 'images'}",
        f"split={world / 'split.json'}",
        f"weights={out / 'model.safetensors'}",
        "precision=fp32",
        f"out={tmp_path / 'evaluation'}",
    )
    assert code == 0, told
    wanted = read_json(tmp_path / "evaluation" / "metrics.json")
    for key in ("AP50_base", "AP50_novel", "AP50_all"):
        assert found[key] == pytest.approx(100 * wanted[key], abs=0.01)


def test_a_checkpoint_of_detectron2_is_evaluated_by_resuming(
    clip_file: Path, rpn_file: Path, datasets: Path, tmp_path: Path
) -> None:
    given = sources(clip_file, rpn_file, tmp_path / "out")
    start(**given, SOLVER__MAX_ITER="1", SOLVER__BASE_LR="0.5", SOLVER__WARMUP_ITERS="0")
    trained = start("--eval-only", "--resume", **given)
    results = read_json(tmp_path / "out" / "inference" / "world_all_test" / "results.json")
    start("--eval-only", **given)
    untrained = read_json(tmp_path / "out" / "inference" / "world_all_test" / "results.json")
    assert results != untrained
    assert trained["bbox"]["AP50_all"] >= 0


@pytest.mark.parametrize(
    "file", sorted(CONFIGS.glob("*/*.yaml")), ids=lambda file: f"{file.parent.name}/{file.stem}"
)
def test_every_shipped_yaml_is_a_config(file: Path) -> None:
    cfg = get_cfg()
    add_regionclip_config(cfg)
    cfg.merge_from_file(str(file))
    assert cfg.MODEL.META_ARCHITECTURE == "OpenVocabularyRCNN"
    assert detector_config(cfg).max_proposals == cfg.MODEL.RPN.POST_NMS_TOPK_TEST
    assert training_config(cfg).rois_per_image == cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE


def test_the_shipped_lazy_config_trains_and_evaluates(
    clip_file: Path, rpn_file: Path, datasets: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = [
        f"sources.weights={clip_file}",
        f"sources.rpn={rpn_file}",
        f"train.output_dir={out}",
        "train.max_iter=2",
        "dataloader.train.total_batch_size=2",
        "dataloader.train.num_workers=0",
        "dataloader.test.num_workers=0",
        "resize.short=[64]",
        "resize.long=64",
    ]
    line = ["--config-file", str(CONFIGS / "world" / "small.py"), *options]
    training.main(default_argument_parser().parse_args(line))
    detector, _ = read_detector_file(out / "model.safetensors")
    assert detector.config.max_proposals == 30
    assert read_json(out / "inference" / "results.json")
    found = training.main(default_argument_parser().parse_args(["--eval-only", "--resume", *line]))
    assert found["bbox"]["AP50_all"] >= 0


def test_the_lazy_config_says_what_the_yaml_says() -> None:
    lazy, cfg = LazyConfig.load(str(CONFIGS / "world" / "small.py")), get_cfg()
    add_regionclip_config(cfg)
    cfg.merge_from_file(str(YAML))
    heads = lazy.model.roi_heads
    assert instantiate(heads.detector) == detector_config(cfg)
    assert instantiate(heads.training) == training_config(cfg)
    assert lazy.train.max_iter == cfg.SOLVER.MAX_ITER
    assert torch.tensor(list(lazy.model.proposal_generator.limits)).unique().tolist() == [
        cfg.MODEL.RPN.POST_NMS_TOPK_TEST
    ]


class Project(DefaultTrainer):
    """What a project has: detectron2's own loaders and mapper, and its evaluator for COCO."""

    @classmethod
    def build_evaluator(cls, cfg: Any, dataset_name: str) -> COCOEvaluator:
        return COCOEvaluator(dataset_name, ("bbox",), output_dir=cfg.OUTPUT_DIR)

    def build_writers(self) -> list[Any]:
        return []  # one of detectron2's needs TensorBoard


def test_ten_lines_turn_a_project_of_detectron2_into_an_open_vocabulary_detector(
    clip_file: Path, rpn_file: Path, world: Path, tmp_path: Path
) -> None:
    text = (ROOT / "docs" / "detectron2.md").read_text()
    lines = text.split("```yaml\n")[1].split("```")[0]
    assert lines.count("\n") == 10
    paths = {
        "my_project.yaml": model_zoo.get_config_file("COCO-Detection/faster_rcnn_R_50_C4_1x.yaml"),
        "runs/regionclip/model.safetensors": clip_file,
        "runs/rpn/model.safetensors": rpn_file,
    }
    for written, path in paths.items():
        assert written in lines
        lines = lines.replace(written, str(path))
    (tmp_path / "open.yaml").write_text(lines)
    for name in ("train", "val"):
        if f"project_{name}" not in DatasetCatalog.list():
            register_coco_instances(
                f"project_{name}", {}, str(world / f"instances_{name}.json"), str(world / "images")
            )
    cfg = get_cfg()
    add_regionclip_config(cfg)
    cfg.merge_from_file(str(tmp_path / "open.yaml"))
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("project_train",), ("project_val",)
    changes = {**OPTIONS, "MODEL.DEVICE": "cpu", "SOLVER.MAX_ITER": "1", "OUTPUT_DIR": str(tmp_path / "out")}
    cfg.merge_from_list([item for pair in changes.items() for item in pair])
    default_setup(cfg, default_argument_parser().parse_args([]))
    trainer = Project(cfg)
    trainer.train()
    assert trainer.model.names == tuple(MetadataCatalog.get("project_val").thing_classes)
    assert read_json(tmp_path / "out" / "coco_instances_results.json")


# What detectron2 has keys and parts of its own for: data, loading, the loop, and what is in weights files.
ELSEWHERE = {
    "annotations",
    "images",
    "split",
    "weights",
    "rpn",
    "network",
    "out",
    "detector",
    "resize",
    "region_head",
    "keep_empty",
    "positive_iou",
    "objectness_weight",
    "proposal_weight",
    "repeat_threshold",
    "freeze_stages",
    "freeze_batch_norm",
    "cache",
    "train",
}
# What keeps a detector's knowledge of names without boxes is for this package's own job, as its page says.
OURS_ALONE = {
    "embeddings",
    "keep_student",
    "starting_share",
    "refit",
    "proposal_distillation",
    "distilled_proposals",
    "background_gate",
    "pseudo_labels",
    "pseudo_weight",
}


def test_no_option_of_ours_is_forgotten() -> None:
    assert {field.name for field in dataclasses.fields(DetectorConfig)} == set(DETECTOR_KEYS)
    fields = {field.name for field in dataclasses.fields(TrainDetectorConfig)}
    assert fields - ELSEWHERE - OURS_ALONE == set(TRAINING_KEYS)
    assert fields >= ELSEWHERE | OURS_ALONE
