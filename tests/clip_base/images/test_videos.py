"""Videos are read frame by frame and written so that they can be read again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from clip_base.images.video import Video, VideoWriter, writing_video
from clip_base.runtime.errors import InputError

Make = Callable[..., Path]


@pytest.fixture
def make_video(tmp_path: Path) -> Make:
    """Writes a video whose frames get lighter: make_video(frames=12, size=(64, 48), rate=8.0)."""

    def make(frames: int = 12, size: tuple[int, int] = (64, 48), rate: float = 8.0) -> Path:
        path = tmp_path / "clip.mp4"
        with writing_video(path, rate) as writer:
            for number in range(frames):
                writer.add(Image.new("RGB", size, (number * 20, 0, 255 - number * 20)))
        return path

    return make


def test_frames_come_in_order_with_number_time_and_color(make_video: Make) -> None:
    with Video(make_video()) as video:
        frames = list(video.frames())
        assert (video.count, video.rate, video.seen, video.shortfall()) == (12, 8.0, 12, "")
    assert [frame.number for frame in frames] == list(range(12))
    assert [frame.time for frame in frames] == pytest.approx([number / 8 for number in range(12)], abs=0.01)
    for frame in frames:
        assert frame.pixels.shape == (48, 64, 3)
        wanted = [frame.number * 20, 0, 255 - frame.number * 20]
        assert np.abs(frame.pixels.reshape(-1, 3).mean(0) - wanted).max() < 12  # RGB, not BGR


def test_every_nth_frame_plays_as_long_as_all(make_video: Make) -> None:
    with Video(make_video(), every=5) as video:
        assert [frame.number for frame in video.frames()] == [0, 5, 10]
        assert (video.count, video.rate) == (3, 1.6)
        assert video.shortfall() == ""


def test_odd_sides_are_made_even(make_video: Make) -> None:
    with Video(make_video(size=(63, 49))) as video:
        assert next(video.frames()).pixels.shape == (48, 62, 3)


def test_a_video_without_frames_leaves_no_file(make_video: Make) -> None:
    path = make_video(frames=0)
    assert list(path.parent.iterdir()) == []


def add_and_fail(writer: VideoWriter) -> None:
    writer.add(Image.new("RGB", (64, 48)))
    raise ValueError("no add")


def test_a_failure_leaves_what_was_there(make_video: Make) -> None:
    path = make_video()
    before = path.read_bytes()
    with pytest.raises(ValueError, match="add"), writing_video(path, 8.0) as writer:
        add_and_fail(writer)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_codec_that_opencv_cannot_write_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2.VideoWriter, "isOpened", lambda self: False, raising=False)
    with (
        pytest.raises(InputError, match=r"cannot encode avc1; give another video_codec= \(mp4v"),
        writing_video(tmp_path / "a.mp4", 8.0, "avc1") as writer,
    ):
        writer.add(Image.new("RGB", (64, 48)))


def test_what_is_no_video_is_refused_and_a_cut_off_one_told(make_video: Make, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(InputError, match=r"text\.mp4 cannot be decoded"):
        Video(tmp_path / "text.mp4")
    with pytest.raises(InputError, match="does not exist"):
        Video(tmp_path / "nowhere.mp4")
    with Video(make_video()) as video:
        next(video.frames())
        assert "ends after 1 of about 12 frames" in video.shortfall()
