"""Tracks through a video's frames, and cameras and streams instead of files."""

from __future__ import annotations

import csv
import itertools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import pytest

from clip_base.images import live
from clip_base.images.live import LiveVideo, is_live, open_video
from clip_base.images.video import Video, VideoFrame
from clip_base.runtime.errors import InputError
from clip_base.storage.files import read_json
from regionclip.inference.detect import DetectionRunner
from regionclip.inference.detection_files import targets_of

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def camera(clip: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Opens the video's file for every camera and stream; returns what was asked for."""
    asked: list[Any] = []

    def opened(place: Any) -> cv2.VideoCapture:
        asked.append(place)
        return capture(str(clip) if is_live(str(place)) else place)

    capture = cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", opened)
    return asked


def test_a_thing_keeps_its_number_through_the_frames(
    clip: Path, options: list[str], tmp_path: Path, regionclip: Command
) -> None:
    pytest.importorskip("trackers")
    call = ["detect", clip, *options, "score_threshold=0.0", "track=true", "proposer.name=grid"]
    code, told = regionclip(*call)
    assert code == 0, told
    tracks: dict[int, list[list[float]]] = defaultdict(list)
    for entry in read_json(tmp_path / "found" / "detections.json"):
        if "track_id" in entry:
            tracks[entry["track_id"]].append(entry["bbox"])
    longest = max(tracks.values(), key=len)
    assert len(longest) > 4
    for before, after in itertools.pairwise(longest):
        assert before == pytest.approx(after, abs=8)  # a grid's boxes stay where they are
    with (tmp_path / "found" / "detections.csv").open() as text:
        rows = list(csv.DictReader(text))
    assert sum(bool(row["track_id"]) for row in rows) == sum(map(len, tracks.values()))


def test_without_byte_track_the_command_to_install_it_is_told_before_a_video_is_read(
    clip: Path, options: list[str], regionclip: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("supervision", "trackers"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(DetectionRunner, "process_video", None)
    code, told = regionclip("detect", clip, *options, "track=true")
    assert (code, "pip install 'regionclip[track]'" in told) == (2, True)


@pytest.mark.parametrize(
    ("place", "lives"),
    [("0", True), ("rtsp://cam/1", True), ("rtsp:/cam/1", True), ("a.mp4", False), ("s3://a/b", False)],
)
def test_cameras_and_streams_are_told_from_files(place: str, lives: bool) -> None:
    assert is_live(place) == lives


def test_a_file_that_is_called_as_a_camera_is_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "0").touch()
    assert not is_live("0")
    assert targets_of([Path("1"), Path("rtsp://cam/1")], tmp_path) == [
        tmp_path / "camera-1.mp4",
        tmp_path / "stream.mp4",
    ]


def test_a_stream_yields_its_newest_frame_and_ends(camera: list[Any], clip: Path) -> None:
    with open_video("rtsp:/cam/1", every=2) as video:
        assert isinstance(video, LiveVideo)
        frames = list(video.frames())
    assert camera == ["rtsp://cam/1"]
    numbers = [frame.number for frame in frames]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == 8  # the newest of ten, every second one
    assert not video.shortfall()
    with Video(clip, 2) as whole:
        assert (whole.frames().__next__().pixels.shape, whole.rate) == (frames[0].pixels.shape, video.rate)


def test_a_camera_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2, "VideoCapture", lambda _: type("None", (), {"isOpened": lambda _: False})())
    with pytest.raises(InputError, match="camera 3 cannot be opened"):
        open_video("3")


def test_ctrl_c_ends_a_camera_and_keeps_what_was_found(
    camera: list[Any],
    options: list[str],
    tmp_path: Path,
    regionclip: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(video: LiveVideo) -> Iterator[VideoFrame]:
        for frame in Video.frames(video):
            if frame.number == 3:
                raise KeyboardInterrupt
            yield frame

    monkeypatch.setattr(live.LiveVideo, "frames", interrupted)
    code, told = regionclip("detect", "0", *options, "score_threshold=0.0")
    assert code == 0, told
    assert "0 was left; what was found is kept" in told
    assert camera == [0]
    found = tmp_path / "found"
    assert {entry["frame"] for entry in read_json(found / "detections.json")} == {0, 1, 2}
    with Video(found / "camera-0.mp4") as drawn:
        assert drawn.count == 3
