"""The job `index`: images embedded once, so that they are found by words.

clip-base index photos weights=RN50 out=my.index
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from clip_base.evaluation.datasets import EvaluationImage
from clip_base.evaluation.features import Embedder, FeatureConfig, note_skipped
from clip_base.jobs.config import REQUIRED, option
from clip_base.jobs.everyday import everyday
from clip_base.search.approximate import build
from clip_base.search.images import images_of
from clip_base.search.index import ABOUT, SHARD_ROWS, Index
from clip_base.storage.hashing import content_hash
from clip_base.storage.lock import lock_file


@everyday(
    "index photos weights=RN50 out=photos.index",
    input="images",
    output="out",
    model="weights",
    speed="batch_size workers device",
)
@dataclass
class IndexConfig(FeatureConfig):
    """Options of `index`."""

    images: list[str] = option(
        REQUIRED, "folders with all below them, files, quoted patterns, or uncompressed tars", positional=True
    )
    out: str = option(REQUIRED, "folder of the index", runtime_only=True)
    approximate: bool = option(
        False,
        "also sort the images into cells (by faiss): worth it from a few million on, see search probes=",
    )


def build_index(config: IndexConfig) -> None:
    """Embeds images into an index; again: only what is new or changed, and what is gone is dropped.

    Images that cannot be read are listed in `skipped.jsonl`. Stopped, the same command resumes behind the
    last shard of 8,192 images.
    """
    with lock_file(config.out):  # two at once would delete each other's shards
        _update(config, Path(config.out))


def _update(config: IndexConfig, out: Path) -> None:
    found = {image.key: image for image in images_of(config.images)}
    embedder = Embedder(config, out)
    weights = content_hash(embedder.path)
    model = embedder.model
    index = Index(model.config.embed_dim, config.weights, weights)
    if (out / ABOUT).exists():
        kept = Index.load(out)
        kept.require_model(weights, str(out))
        index = replace(kept, model=config.weights)
    dropped = index.keep({key: image.stamp for key, image in found.items()})
    known = set(index.keys)
    new = [image for key, image in found.items() if key not in known]
    index.save(out)
    skipped = []
    for start in range(0, len(new), SHARD_ROWS):
        part = new[start : start + SHARD_ROWS]
        examples = [EvaluationImage(image.place, 0) for image in part]
        features = embedder.embed(examples, f"indexing {len(new):,} images, from {start + 1:,}")
        embedder.require_finite(features.values, "images")
        rows = [part[place] for place in features.kept.tolist()]
        if rows:
            index.add([row.key for row in rows], features.values, [row.stamp for row in rows])
            index.save(out)
        skipped += features.skipped
    print(
        f"{out}: {len(index):,} images; {len(new) - len(skipped):,} new, {len(known):,} kept, "
        f"{dropped:,} dropped, {len(skipped):,} unreadable"
    )
    if config.approximate:
        build(index, out)
    note_skipped(skipped, len(new), config.max_skipped, out / "skipped.jsonl")
