"""Our evaluation as one of detectron2's evaluators."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import logging
from pathlib import Path
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.data import MetadataCatalog, build_detection_test_loader, build_detection_train_loader
from detectron2.engine import AMPTrainer, DefaultTrainer, SimpleTrainer, default_setup, default_writers, hooks
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.events import TensorboardXWriter
from torch import nn

from clip_base.runtime.errors import InputError
from clip_base.storage.files import make_folder, write_json
from regionclip.checkpoints.load import save_detector
from regionclip.detectron2.backbone import to_detector
from regionclip.detectron2.catalog import class_names, register_listed
from regionclip.detectron2.config import add_regionclip_config
from regionclip.detectron2.mapper import RegionMapper
from regionclip.detectron2.modeling import OpenVocabularyRCNN
from regionclip.detectron2.structures import from_instances
from regionclip.metrics.average_precision import Protocol, evaluate_detections
from regionclip.structures.transforms import ResizeConfig


class OpenVocabularyEvaluator(DatasetEvaluator):  # type: ignore[misc]
    """Average precision of base, novel and all classes in percent, as `regionclip evaluate` computes it.

    Args:
        dataset: a dataset of the catalogs, with its annotations in COCO's format as `json_file`.
        out: folder for `results.json` in COCO's results format; None: it is not written.
        max_detections: best scored detections per image that count; 0: 100 (COCO), 300 (LVIS).
    """

    def __init__(self, dataset: str, out: str | Path | None = None, max_detections: int = 0) -> None:
        self.dataset, self.out, self.max_detections = dataset, out, max_detections
        self.entries: list[dict[str, Any]] = []

    def reset(self) -> None:
        """Forgets what was processed."""
        self.entries = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Takes a batch's detections."""
        metadata = MetadataCatalog.get(self.dataset)
        names, _ = class_names(self.dataset)
        ids = {label: category for category, label in metadata.thing_dataset_id_to_contiguous_id.items()}
        for image, output in zip(inputs, outputs, strict=True):
            detections = from_instances(output["instances"], names)
            self.entries += detections.to_coco(image["image_id"], [ids[label] for label in range(len(names))])

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Returns {"bbox": metrics} in the first process, None in the others."""
        gathered = comm.gather(self.entries, dst=0)
        if not comm.is_main_process():
            return None
        entries = list(itertools.chain.from_iterable(gathered))
        if self.out is not None:
            make_folder(self.out)
            write_json(Path(self.out) / "results.json", entries)
        metadata = MetadataCatalog.get(self.dataset)
        protocol = Protocol(max_detections=self.max_detections, label_set=getattr(metadata, "part", "all"))
        found = evaluate_detections(metadata.json_file, entries, getattr(metadata, "split", None), protocol)
        return {"bbox": {key: 100 * value if value >= 0 else value for key, value in found.metrics.items()}}


logger = logging.getLogger("detectron2.regionclip")


class Trainer(DefaultTrainer):  # type: ignore[misc]
    """detectron2's trainer with our mapper and our evaluation; leaves a detector of ours at the end."""

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Loads with `RegionMapper`."""
        return build_detection_train_loader(cfg, mapper=RegionMapper(cfg, True))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Loads with `RegionMapper`."""
        return build_detection_test_loader(cfg, dataset_name, mapper=RegionMapper(cfg, False))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> OpenVocabularyEvaluator:
        """Measures base, novel and all classes."""
        folder = Path(cfg.OUTPUT_DIR) / "inference" / dataset_name
        return OpenVocabularyEvaluator(dataset_name, folder, cfg.TEST.DETECTIONS_PER_IMAGE)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict[str, Any]:
        """Evaluates on each test set with its own vocabulary; returns {test set: its results}."""
        results = {}
        for name in cfg.DATASETS.TEST:
            one = cfg.clone()
            one.defrost()
            one.DATASETS.TEST = (name,)
            unwrapped(model).roi_heads.use_dataset(name)
            results[name] = super().test(one, model, evaluators)
        return results if len(results) > 1 else next(iter(results.values()), {})

    def build_writers(self) -> list[Any]:
        """Writes what detectron2 writes; events for TensorBoard only where that is installed."""
        return writers(self.cfg.OUTPUT_DIR, self.max_iter)

    def build_hooks(self) -> list[Any]:
        """Adds the detector's file to detectron2's hooks, before the evaluation."""
        cfg = self.cfg
        resize = RegionMapper.from_config(cfg, False)["resize"]
        save = SaveDetector(self.model, cfg.OUTPUT_DIR, resize, cfg.DATASETS.TRAIN[0])
        return with_detector(super().build_hooks(), save)


class SaveDetector(hooks.HookBase):  # type: ignore[misc]
    """Writes `model.safetensors` after training, which `regionclip evaluate` and `detect` take."""

    def __init__(self, model: nn.Module, folder: str, resize: ResizeConfig, dataset: str) -> None:
        self.model, self.folder, self.resize, self.dataset = model, folder, resize, dataset

    def after_train(self) -> None:
        """Writes the file in the first process, unless parts of the model are not ours."""
        if not comm.is_main_process() or self.trainer.iter + 1 < self.trainer.max_iter:
            return
        try:
            detector = to_detector(unwrapped(self.model), self.resize)
        except InputError as error:
            logger.info("no model.safetensors is written: %s", error)
            return
        path = Path(self.folder) / "model.safetensors"
        save_detector(detector, path, class_names(self.dataset)[0])
        logger.info("the detector is in %s", path)


def with_detector(found: list[Any], save: SaveDetector) -> list[Any]:
    """Puts `save` before the hook that evaluates."""
    place = next(place for place, hook in enumerate(found) if isinstance(hook, hooks.EvalHook))
    return [*found[:place], save, *found[place:]]


def writers(folder: str, steps: int) -> list[Any]:
    """Returns detectron2's writers; the one for TensorBoard only where that is installed."""
    found = default_writers(folder, steps)
    if importlib.util.find_spec("tensorboard") is None:
        return [writer for writer in found if not isinstance(writer, TensorboardXWriter)]
    return list(found)


def unwrapped(model: nn.Module) -> Any:
    """Returns the model inside the wrapper for several processes, or as it is."""
    return getattr(model, "module", model)


def main(arguments: argparse.Namespace) -> Any:
    """Trains, or evaluates with --eval-only, what --config-file says: YAML, or a LazyConfig in Python."""
    if arguments.config_file.endswith(".py"):
        return _lazy(arguments)
    cfg = get_cfg()
    add_regionclip_config(cfg)
    cfg.merge_from_file(arguments.config_file)
    cfg.merge_from_list(arguments.opts)
    for name, dataset in cfg.DATASETS.OPEN_VOCABULARY.items():
        register_listed(name, **{key.lower(): value for key, value in dataset.items()})
    cfg.freeze()
    default_setup(cfg, arguments)
    if arguments.eval_only:
        model = Trainer.build_model(cfg)
        checkpointer = DetectionCheckpointer(model, cfg.OUTPUT_DIR)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=arguments.resume)
        return Trainer.test(cfg, model)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=arguments.resume)
    return trainer.train()


def _lazy(arguments: argparse.Namespace) -> Any:
    cfg = LazyConfig.apply_overrides(LazyConfig.load(arguments.config_file), arguments.opts)
    default_setup(cfg, arguments)
    for name, dataset in cfg.get("datasets", {}).items():
        register_listed(name, **dataset)
    model = instantiate(cfg.model).to(cfg.train.device)
    if arguments.eval_only:
        model = create_ddp_model(model)
        checkpointer = DetectionCheckpointer(model, cfg.train.output_dir)
        checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=arguments.resume)
        return _test(cfg, model)
    return _train(arguments, cfg, model)


def _test(cfg: Any, model: nn.Module) -> dict[str, Any] | None:
    evaluator = instantiate(cfg.dataloader.evaluator)
    results: dict[str, Any] | None = inference_on_dataset(model, instantiate(cfg.dataloader.test), evaluator)
    if results:
        print_csv_format(results)
    return results


def _train(arguments: argparse.Namespace, cfg: Any, model: OpenVocabularyRCNN) -> None:
    cfg.optimizer.params.model = model
    optimizer, loader = instantiate(cfg.optimizer), instantiate(cfg.dataloader.train)
    wrapped = create_ddp_model(model, **cfg.train.ddp)
    trainer = (AMPTrainer if cfg.train.amp.enabled else SimpleTrainer)(wrapped, loader, optimizer)
    checkpointer = DetectionCheckpointer(wrapped, cfg.train.output_dir, trainer=trainer)
    resize = instantiate(cfg.dataloader.test.mapper).resize
    save = SaveDetector(wrapped, cfg.train.output_dir, resize, model.roi_heads.datasets[True])
    is_first = comm.is_main_process()
    own = [
        hooks.IterationTimer(),
        hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
        hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer) if is_first else None,
        hooks.EvalHook(cfg.train.eval_period, lambda: _test(cfg, wrapped)),
        hooks.PeriodicWriter(writers(cfg.train.output_dir, cfg.train.max_iter), cfg.train.log_period)
        if is_first
        else None,
    ]
    trainer.register_hooks(with_detector(own, save))
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=arguments.resume)
    goes_on = arguments.resume and checkpointer.has_checkpoint()
    trainer.train(trainer.iter + 1 if goes_on else 0, cfg.train.max_iter)
