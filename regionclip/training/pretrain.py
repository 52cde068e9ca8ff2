"""The job `pretrain`: region pretraining on mined pairs (arXiv 2112.09106, 3.3) or on crops."""

from __future__ import annotations

import functools
import shutil
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from clip_base.images.folders import list_images
from clip_base.jobs.config import Plugin
from clip_base.jobs.run import RunFolder, files_of
from clip_base.models.clip import CLIP
from clip_base.models.tokenizer import Tokenizer
from clip_base.runtime import distributed
from clip_base.runtime.errors import InputError
from clip_base.training.loop import TrainConfig
from clip_base.training.pretrain import last_loss
from clip_base.weights.load import load_clip, weight_files
from clip_base.weights.native import save_clip
from regionclip.concepts.synonyms import synonym_sets
from regionclip.concepts.vocabulary import Vocabulary
from regionclip.mining.scale import TRAINED_AT
from regionclip.mining.shards import MANIFEST, local_mined, read_manifest
from regionclip.models.region_heads import KEY, choose_head
from regionclip.models.teachers.identity import DEFAULT, source_of
from regionclip.training.mined import MinedSamples
from regionclip.training.region_text import RegionPretrainConfig, RegionTextTask
from regionclip.training.samples import GridPatchDataset, RegionDataset, Sample, fit_on
from regionclip.training.teacher import Teacher
from regionclip.training.text_space import in_one_space

SAMPLES = ".samples"  # folder of what is written of the mined shards to read it in any order
GROUP = 8  # compressed tars that are shuffled together


def image_samples(folder: str) -> list[Sample]:
    """Returns one sample without boxes for each image in a folder and its subfolders, sorted by path."""
    return [Sample(path, torch.zeros(0, 4)) for path in list_images(folder)]


def scaled(train: TrainConfig, lr_reference_batch_size: int) -> TrainConfig:
    """Returns the training with the learning rate in proportion to its batch, and says so.

    Args:
        train: its lr is for batches of `lr_reference_batch_size`.
        lr_reference_batch_size: 0 leaves the learning rate as it is.
    """
    if lr_reference_batch_size in (0, train.batch_size):
        return train
    lr = train.lr * train.batch_size / lr_reference_batch_size
    print(
        f"learning rate {lr:g}: {train.lr:g} is for a batch of {lr_reference_batch_size}, "
        f"this one is {train.batch_size}"
    )
    return replace(train, lr=lr)


def pretrain(config: RegionPretrainConfig) -> None:
    """Pretrains a CLIP on mined regions or crops; writes `out/model.safetensors`."""
    inputs = {**weight_files(config, "weights"), **files_of(config, "captions", "synonyms")}
    given, config = config, replace(config, mined=local_mined(config.mined))
    manifest = Path(config.mined) / MANIFEST
    if config.teacher:
        inputs["teacher"] = source_of(_backend(config), config.teacher)
    if config.mined and manifest.exists():  # else reading the shards says what is wrong
        inputs["mined"] = manifest
    run = RunFolder(config.out, given, "region-pretrain", inputs)
    if run.finished() is not None:
        print(f"{run.path} is complete: {run.path / 'model.safetensors'}")
        return
    distributed.start()
    distributed.wait()  # until the first process has the folder, in which the others write too
    model = load_clip(config.weights)
    torch.manual_seed(config.train.seed)
    task, data = _on_shards(config, model, run.path / SAMPLES) if config.mined else _on_images(config, model)
    train = scaled(config.train, config.lr_reference_batch_size)
    steps = fit_on(data, task, train, run, order=_order_of(config, data))
    notes = {KEY: task.encoder.region_head} if task.encoder.pools_maps else {}
    notes[TRAINED_AT] = str(config.resize.jitter.side or round(statistics.median(config.resize.short)))
    save_clip(task.model, run.path / "model.safetensors", notes)
    regions = data.samples.regions if isinstance(data.samples, MinedSamples) else 0
    loss = last_loss(run.log_path)
    if distributed.is_first():
        shutil.rmtree(run.path / SAMPLES, ignore_errors=True)
    run.finish({"steps": steps, "images": len(data), "regions": regions, "loss": loss})
    what = f"{regions} regions of {len(data)} images" if config.mined else f"patches of {len(data)} images"
    print(f"{run.path / 'model.safetensors'}: {steps} steps on {what}")


def _backend(config: RegionPretrainConfig) -> Plugin:
    """Returns the backend of the teacher that mined; this package's where reading the shards tells faults."""
    if not (Path(config.mined) / MANIFEST).exists():
        return DEFAULT
    found: Plugin = read_manifest(config.mined, "config")["config"].get("backend", DEFAULT)
    return found


def _order_of(
    config: RegionPretrainConfig, data: RegionDataset
) -> Callable[[torch.Generator], torch.Tensor] | None:
    """Returns the order in which shards are read in groups; None: all samples are shuffled together."""
    if not isinstance(data.samples, MinedSamples):
        return None
    group = config.shuffle_shards or (GROUP if data.samples.places.gzipped else 0)
    return functools.partial(data.samples.order, group) if group else None


def _on_shards(
    config: RegionPretrainConfig, model: CLIP, cache: Path
) -> tuple[RegionTextTask, RegionDataset]:
    # Groups overlap where one ends and the next begins, in as many batches as are loaded ahead.
    window = 2 * (config.shuffle_shards or GROUP)
    try:
        samples = MinedSamples(config.mined, cache, config.images, config.captions, window)
    except InputError:  # a call that failed at once leaves nothing that a fixed one would have to equal
        shutil.rmtree(cache, ignore_errors=True)
        raise
    manifest = read_manifest(config.mined, *Teacher.NEEDS if config.teacher else ())
    mined = Vocabulary.load(Path(config.mined) / "vocabulary.safetensors")
    model, vocabulary = in_one_space(model, mined, config)
    teacher = Teacher.from_manifest(config.teacher, manifest, mined) if config.teacher else None
    synonyms, head = synonym_sets(manifest, config.synonyms), choose_head(config.region_head, config.weights)
    task = RegionTextTask(model, vocabulary, config, teacher, synonyms, head)
    tokenizer = Tokenizer(model.config.text.context_length)
    return task, RegionDataset(samples, config.resize, config.max_regions, tokenizer, config.cache)


def _on_images(config: RegionPretrainConfig, model: CLIP) -> tuple[RegionTextTask, RegionDataset]:
    samples = image_samples(config.images)
    data = GridPatchDataset(samples, config.max_grid, config.resize, config.max_regions, cache=config.cache)
    head = choose_head(config.region_head, config.weights)
    return RegionTextTask(model, None, config, region_head=head), data
