"""The job `pretrain`: region pretraining on mined pairs (arXiv 2112.09106, 3.3) or on crops."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch

from clip_base.data.coco import read_captions
from clip_base.images.folders import list_images
from clip_base.jobs.run import RunFolder, files_of
from clip_base.jobs.skipped import MAX_SKIPPED, require_present
from clip_base.models.clip import CLIP
from clip_base.models.tokenizer import Tokenizer
from clip_base.runtime import distributed
from clip_base.runtime.errors import InputError
from clip_base.storage.tars import Member
from clip_base.training.loop import TrainConfig
from clip_base.training.pretrain import last_loss
from clip_base.weights.load import load_clip, weight_files
from clip_base.weights.native import save_clip
from regionclip.concepts.synonyms import synonym_sets
from regionclip.concepts.vocabulary import Vocabulary
from regionclip.data.file_names import ids_by_name
from regionclip.mining.places import MinedImages
from regionclip.mining.shards import MANIFEST, MinedRegion, read_images, read_manifest, read_regions
from regionclip.models.region_heads import KEY, choose_head
from regionclip.training.region_text import RegionPretrainConfig, RegionTextTask, Teacher
from regionclip.training.samples import GridPatchDataset, RegionDataset, Sample, fit_on


def mined_samples(mined: str, images: str, captions: str) -> list[Sample]:
    """Reads mined regions as training samples, one per image.

    Args:
        mined: folder of shards.
        images: folder of the images, or their tars; "" is the manifest's.
        captions: COCO captions, which find their images by file name; "": those that were mined.

    Raises:
        InputError: there are no regions, or the captions are of other images.
    """
    manifest = read_manifest(mined, "images_folder", "tars")
    regions = list(read_regions(mined))
    if not regions:
        raise InputError(f"{mined} has no regions; see its skipped.jsonl, and lower the matcher's thresholds")
    rows = {image.image_id: image for image in read_images(mined) if image.regions}
    texts = {key: image.captions for key, image in rows.items()}
    if captions:
        found, names = read_captions(captions)
        own = {key: image.file_name for key, image in rows.items()}
        ids = ids_by_name(own, names, "the mined regions", f"captions file {captions}")
        texts = {key: tuple(found.get(other, ())) for key, other in ids.items()}
    places = MinedImages(manifest, mined, images)
    files = [path for image in rows.values() if isinstance(path := places(image), Path)]
    require_present(files, MAX_SKIPPED, f"images={images or manifest['images_folder']}")
    width = max(len(region.concept_ids) for region in regions)
    return [
        _sample(places(rows[image_id]), list(group), texts.get(image_id, ()), width)
        for image_id, group in groupby(regions, key=lambda region: region.image_id)
    ]


def _sample(
    place: Path | Member, regions: list[MinedRegion], captions: tuple[str, ...], width: int
) -> Sample:
    """Makes one image's sample; concepts are padded to `width` with concept 0 of probability 0."""
    ids, probs = torch.zeros(len(regions), width, dtype=torch.int64), torch.zeros(len(regions), width)
    for row, region in enumerate(regions):
        ids[row, : len(region.concept_ids)] = torch.tensor(region.concept_ids)
        probs[row, : len(region.concept_probs)] = torch.tensor(region.concept_probs)
    boxes = torch.tensor([region.box for region in regions])
    size = (regions[0].height, regions[0].width)
    return Sample(place, boxes, None, ids, probs, captions, size)


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
    inputs = {**weight_files(config, "weights", "teacher"), **files_of(config, "captions", "synonyms")}
    manifest = Path(config.mined) / MANIFEST
    if config.mined and manifest.exists():  # else reading the shards says what is wrong
        inputs["mined"] = manifest
    run = RunFolder(config.out, config, "region-pretrain", inputs)
    if run.finished() is not None:
        print(f"{run.path} is complete: {run.path / 'model.safetensors'}")
        return
    distributed.start()
    model = load_clip(config.weights)
    torch.manual_seed(config.train.seed)
    task, data = _on_shards(config, model) if config.mined else _on_images(config, model)
    steps = fit_on(data, task, scaled(config.train, config.lr_reference_batch_size), run)
    notes = {KEY: task.encoder.region_head} if task.encoder.pools_maps else {}
    save_clip(model, run.path / "model.safetensors", notes)
    regions = sum(len(sample.boxes) for sample in data.samples)
    loss = last_loss(run.log_path)
    run.finish({"steps": steps, "images": len(data), "regions": regions, "loss": loss})
    what = f"{regions} regions of {len(data)} images" if config.mined else f"patches of {len(data)} images"
    print(f"{run.path / 'model.safetensors'}: {steps} steps on {what}")


def _on_shards(config: RegionPretrainConfig, model: CLIP) -> tuple[RegionTextTask, RegionDataset]:
    samples = mined_samples(config.mined, config.images, config.captions)
    manifest = read_manifest(config.mined, *Teacher.NEEDS if config.teacher else ())
    vocabulary = Vocabulary.load(Path(config.mined) / "vocabulary.safetensors")
    vocabulary.require_width(model.config.embed_dim, config.weights)
    teacher = Teacher.from_manifest(config.teacher, manifest) if config.teacher else None
    synonyms, head = synonym_sets(manifest, config.synonyms), choose_head(config.region_head, config.weights)
    task = RegionTextTask(model, vocabulary, config, teacher, synonyms, head)
    tokenizer = Tokenizer(model.config.text.context_length)
    return task, RegionDataset(samples, config.resize, config.max_regions, tokenizer, config.cache)


def _on_images(config: RegionPretrainConfig, model: CLIP) -> tuple[RegionTextTask, RegionDataset]:
    samples = image_samples(config.images)
    data = GridPatchDataset(samples, config.max_grid, config.resize, config.max_regions, cache=config.cache)
    head = choose_head(config.region_head, config.weights)
    return RegionTextTask(model, None, config, region_head=head), data
