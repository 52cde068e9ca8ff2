"""Jobs on a Ray cluster of three nodes leave what they leave on one machine, also when a node is lost."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from clip_base.jobs.cli import main_regionclip
from clip_base.synthetic.scenes import ScenesConfig, generate

pytestmark = pytest.mark.slow


def left_in(folder: Path, *patterns: str) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for pattern in patterns for path in folder.glob(pattern)}
    assert found
    return found


def lose_a_node(cluster: Any, begun: Path, lost: list[str]) -> None:
    """Takes a node away, with all that runs there, as soon as a file stands in a folder."""
    while not list(begun.glob("*.parquet")):
        time.sleep(0.02)
    node = next(node for node in cluster.list_all_nodes() if node is not cluster.head_node)
    cluster.remove_node(node, allow_graceful=False)
    lost.append(node.node_id)


def test_jobs_leave_the_same_bytes_and_mining_survives_the_loss_of_a_node(
    cluster: Any, mining_options: list[str], world: Path, detector_file: Path, tmp_path: Path, swapped: Any
) -> None:
    one, two = tmp_path / "local", tmp_path / "ray"
    concepts = ["concepts", f"captions={world / 'captions_train.json'}", "min_count=1", "batch_size=8"]
    sizes = ["resize.short=[64]", "resize.long=64", "shard_images=3", "precision=fp32"]
    features = ["features", str(world / "images" / "train"), f"weights={detector_file}", *sizes]
    mine = ["mine", *swapped(mining_options, shard_images=1)]
    scenes: dict[str, Any] = {"images": 12, "val_images": 4, "size": 64, "object_min": 0.3, "workers": 1}
    generate(ScenesConfig(out=str(tmp_path / "w"), format="webdataset", tar_images=5, seed=5, **scenes))
    packed = swapped(mining_options, images=f"{tmp_path / 'w'}/train-*.tar")
    tars = ["mine", *[option for option in packed if not option.startswith("captions=")]]
    on_ray = ["executor=ray", "workers=3"]
    assert main_regionclip([*mine, f"out={one / 'mined'}"]) == 0
    assert main_regionclip([*tars, f"out={one / 'tars'}"]) == 0
    assert main_regionclip([*concepts, f"out={one / 'concepts.jsonl'}"]) == 0
    assert main_regionclip([*features, f"out={one / 'features'}"]) == 0

    assert main_regionclip([*concepts, f"out={two / 'concepts.jsonl'}", *on_ray]) == 0
    assert main_regionclip([*features, f"out={two / 'features'}", *on_ray]) == 0
    assert main_regionclip([*tars, f"out={two / 'tars'}", *on_ray]) == 0
    lost: list[str] = []
    thread = threading.Thread(target=lose_a_node, args=(cluster, two / "mined", lost), daemon=True)
    thread.start()
    assert main_regionclip([*mine, f"out={two / 'mined'}", *on_ray]) == 0
    thread.join(60)
    assert lost

    for name, patterns in {
        "mined": ("*.parquet", "skipped.jsonl", "vocabulary.safetensors"),
        "tars": ("*.parquet", "images/*.parquet"),
        "features": ("*.parquet",),
        ".": ("concepts.jsonl",),
    }.items():
        assert left_in(two / name, *patterns) == left_in(one / name, *patterns)
    assert len(left_in(two / "mined", "*.parquet")) == 12
