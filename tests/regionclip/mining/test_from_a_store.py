"""Tars, weights and concepts in an object store are mined into it; report and training read them there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from clip_base.storage import remote, remote_cache
from clip_base.storage.remote import filesystem
from clip_base.synthetic.scenes import ScenesConfig, generate
from regionclip.mining.shards import MinedRegion, read_manifest, read_regions

pytestmark = pytest.mark.slow
Command = Callable[..., tuple[int, str]]


def plain(region: MinedRegion) -> MinedRegion:
    """A region without what says where its image is."""
    return replace(region, image_id=0, key="", tar=None)


def test_tars_in_a_store_give_the_regions_of_the_folder(
    store: str,
    mined: Path,
    mining_options: list[str],
    clip_file: Path,
    concepts_file: Path,
    tmp_path: Path,
    regionclip: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files, _ = filesystem(store)
    sizes = {"images": 12, "val_images": 4, "size": 64, "object_min": 0.3, "workers": 1, "seed": 5}
    generate(ScenesConfig(out=str(tmp_path / "w"), format="webdataset", tar_images=5, **sizes))
    for tar in (tmp_path / "w").glob("train-*.tar"):
        files.put_file(str(tar), f"bucket/world/{tar.name}")
    for file in (clip_file, concepts_file):
        files.put_file(str(file), f"bucket/world/{file.name}")
    monkeypatch.setenv("CLIP_BASE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    remote_cache.fetch.cache_clear()
    given = ("captions=", "images=", "weights=", "concepts=")
    options = [option for option in mining_options if not option.startswith(given)]
    world = [f"images={store}/world", f"concepts={store}/world/{concepts_file.name}"]
    weights = f"weights={store}/world/{clip_file.name}"
    mine = ["mine", *options, *world, weights, f"out={store}/mined"]
    code, told = regionclip(*mine)
    assert code == 0, told

    folder = remote_cache.fetch(f"{store}/mined")
    assert list(map(plain, read_regions(folder))) == list(map(plain, read_regions(mined)))
    assert read_manifest(folder)["images"] == 12
    assert not list((tmp_path / "cache").rglob("*.tar"))  # tars are never here whole

    code, told = regionclip("report", f"mined={store}/mined", f"out={tmp_path / 'report'}")
    assert code == 0, told
    training = ["train.steps=2", "train.batch_size=4", "train.precision=fp32", "resize.short=[64]"]
    training += ["resize.long=64", weights, f"out={tmp_path / 'trained'}"]
    code, told = regionclip("pretrain", f"mined={store}/mined", *training)
    assert code == 0, told
    assert (tmp_path / "trained" / "model.safetensors").exists()
