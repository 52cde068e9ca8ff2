"""What jobs do with files of every kind, as one call each."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fuzz_makers import (
    train,
)

from clip_base.data.batch import ImageBatch
from clip_base.data.sources import SOURCES
from clip_base.evaluation.datasets import shard_captions, tar_images
from clip_base.images.decode import decode, decode_stored, load_image
from clip_base.images.inputs import read_upright
from clip_base.images.orientation import upright_size
from clip_base.images.video import Video
from clip_base.jobs.config import build_plugin, resolve
from clip_base.jobs.resume_log import ResumeLog
from clip_base.runtime.errors import InputError
from clip_base.search.find import thumbnails
from clip_base.search.index import Index
from clip_base.weights.load import load_clip
from regionclip.checkpoints.load import load_detector
from regionclip.concepts.synonyms import synonym_sets
from regionclip.concepts.vocabulary import Vocabulary
from regionclip.data.caption_index import CaptionIndex, write_caption_index
from regionclip.data.captions import read_texts
from regionclip.mining.coverage import reasons
from regionclip.mining.mine import MineConfig
from regionclip.mining.report import skipped_images
from regionclip.mining.shards import read_manifest, read_regions
from regionclip.proposals.base import ImageInfo
from regionclip.proposals.precomputed import PrecomputedConfig, PrecomputedProposer
from regionclip.training.mined import MinedSamples
from regionclip.training.teacher import Teacher

Read = Callable[[Path], object]
_CACHES = itertools.count()


def drain(pairs: Any, decoding: bool = False) -> None:
    """Draws every pair; one that cannot be used costs only itself."""
    for index in range(len(pairs)):
        try:
            pair = pairs[index]
            str(pair.image), pair.captions
            if decoding:
                decode(pair.image)
        except InputError:
            pass


def source(**options: Any) -> Any:
    return build_plugin(SOURCES, options).pairs()


def images_listed(folder: Path) -> None:
    write_caption_index(folder / "a.json", folder / "list.db", folder / "images")
    images_of_list(folder)


def images_of_list(folder: Path) -> None:
    index = CaptionIndex(folder / "list.db")
    for part in index.slices(3):
        index.read(part)
    len(index)


def propose(folder: Path) -> None:
    proposer = PrecomputedProposer(PrecomputedConfig(file=str(next(folder.glob("p.*")))))
    infos = [ImageInfo(number, 24, 32, f"{number}.jpg") for number in range(1, 5)]
    proposer(ImageBatch(torch.zeros(4, 3, 24, 32), torch.tensor([[24, 32]] * 4)), infos)


def read_mined(folder: Path) -> None:
    """What `pretrain`, `report` and `export` read of a mined folder."""
    pairs = folder / "mined"
    list(samples(folder, str(folder / "images"), str(folder / "a.json")))
    list(read_regions(pairs))
    Vocabulary.load(pairs / "vocabulary.safetensors")


def samples(folder: Path, images: str = "", captions: str = "") -> MinedSamples:
    """The training samples, with a cache of their own: files stay open by their paths."""
    return MinedSamples(folder / "mined", folder / f"cache-{next(_CACHES)}", images, captions)


def read_where_it_says(folder: Path) -> None:
    """As `read_mined`, with the images and captions that the manifest names."""
    list(samples(folder))
    synonym_sets(read_manifest(folder / "mined"), [])


def read_reasons(folder: Path) -> None:
    reasons(skipped_images(folder / "mined"))


def read_teacher(folder: Path) -> None:
    manifest = read_manifest(folder / "mined", *Teacher.NEEDS)
    Teacher.from_manifest(str(folder / "w.safetensors"), manifest)
    synonym_sets(manifest, [])


def read_image(folder: Path) -> None:
    """Every way by which jobs read an image; each refuses by itself."""
    file, refused = folder / "a.img", list[InputError]()
    readers: tuple[Callable[[], object], ...] = (
        lambda: decode_stored(file),
        lambda: decode(file, 8),
        lambda: read_upright(file),
        lambda: upright_size(file),
        lambda: load_image(file, (24, 32)),
    )
    for read in readers:
        try:
            read()
        except InputError as error:
            refused.append(error)
    if refused:
        raise refused[0]


def read_video(folder: Path) -> None:
    with Video(folder / "a.mp4") as opened:
        for frame in opened.frames():
            if frame.number > 50:
                break
        opened.shortfall()


def resume(folder: Path) -> None:
    """Goes on in a run folder one of whose files is damaged."""
    (folder / "run" / "metrics.json").unlink()
    train(folder)


def see_finished(folder: Path) -> None:
    train(folder)


def read_journal(folder: Path) -> None:
    with ResumeLog(folder / "log.jsonl", {"a": 1}) as log:
        list(log.entries("found"))


def search(folder: Path) -> None:
    found = Index.load(folder / "my.index")
    hits = found.search(torch.ones(found.width), 3) if len(found) else []
    list(found.duplicates(0.9))
    [shot.source for shot in thumbnails(hits)]


def read_tars(folder: Path) -> None:
    pairs = source(name="webdataset", shards=str(folder / "test"), captions=["txt", "json.key"])
    drain(pairs, decoding=True)
    shard_captions(folder)
    tar_images(folder)


def from_table(folder: Path, name: str) -> None:
    file, options = next(folder.glob("t.*")), {"images": str(folder / "images")}
    drain(source(name=name, file=str(file), **options), decoding=True)
    list(read_texts(file))


def weights_of(name: str) -> Read:
    return lambda folder: load_clip(folder / name)


def detected(folder: Path) -> None:
    load_detector(str(folder / "w.safetensors"))


def mine_options(folder: Path) -> None:
    resolve(MineConfig, folder / "c.yaml")
