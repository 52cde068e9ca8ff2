"""Detection in videos: every frame that was asked for, drawn and listed; a broken one costs only itself."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from clip_base.images.video import Video
from clip_base.storage.files import read_json

Command = Callable[..., tuple[int, str]]


def test_videos_are_looked_at_frame_by_frame(
    photos: Path, clip: Path, options: list[str], tmp_path: Path, regionclip: Command
) -> None:
    found = tmp_path / "found"
    arguments = ["detect", clip, photos, *options, "batch_size=3", "score_threshold=0.0"]
    assert regionclip(*arguments)[0] == 0
    entries = read_json(found / "detections.json")
    frames = {(e["frame"], e["time"], e["image_id"]) for e in entries if e["file_name"] == str(clip)}
    assert frames == {(number, number / 5, 5 + number) for number in range(10)}  # four images come first
    assert all("frame" not in entry for entry in entries if entry["file_name"] != str(clip))
    with Video(found / "clip.mp4") as drawn, Video(clip) as plain:
        assert (drawn.rate, drawn.count) == (5.0, 10)
        for one, other in zip(drawn.frames(), plain.frames(), strict=True):
            assert one.pixels.shape == (384, 384, 3)  # small ones are enlarged, so that names can be read
            small = np.asarray(Image.fromarray(one.pixels).resize((64, 64)), dtype=float)
            assert np.abs(small - other.pixels).mean() > 3
    assert (
        regionclip(*arguments[:2], *options, "frame_stride=4", "draw=false", f"out={tmp_path / 'some'}")[0]
        == 0
    )
    some = read_json(tmp_path / "some" / "detections.json")
    assert {(entry["frame"], entry["image_id"]) for entry in some} == {(0, 1), (4, 2), (8, 3)}
    assert not (tmp_path / "some" / "clip.mp4").exists()


def test_a_broken_video_costs_only_itself(
    photos: Path, clip: Path, options: list[str], tmp_path: Path, regionclip: Command
) -> None:
    (photos / "broken.mp4").write_bytes(b"no video")
    shutil.copy(clip, photos / "whole.mp4")
    code, told = regionclip("detect", photos, *options)
    assert code == 0
    assert "note: 1 of 6 images could not be read" in told
    assert "broken.mp4" in (tmp_path / "found" / "skipped.jsonl").read_text()
    assert (tmp_path / "found" / "whole.mp4").exists()
    assert not (tmp_path / "found" / "broken.mp4").exists()
