"""Cameras and network streams, read as videos are; what is not looked at in time is left out."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from clip_base.images.video import Video, VideoFrame, capture_rate
from clip_base.runtime.errors import InputError

_STREAM = re.compile(r"(rtsp|rtsps|rtmp|udp|tcp):/{1,2}(?=[^/])")  # pathlib makes one slash of two
PATIENCE = 20.0  # seconds without a frame that end a stream


def is_live(place: str) -> bool:
    """Whether a text is a camera's number, such as 0 (unless a file is called so), or a stream's address."""
    return (place.isdecimal() and not Path(place).exists()) or _STREAM.match(place) is not None


def open_video(place: str, every: int = 1, seconds: float = 0.0) -> Video:
    """Opens a video's file, a camera or a stream.

    Args:
        place: a path, a camera's number, or an address.
        every: only each `every`-th frame is taken.
        seconds: when a camera or a stream ends; 0: never.

    Raises:
        InputError: there is none, or nothing that can be decoded comes from it.
    """
    return LiveVideo(place, every, seconds) if is_live(place) else Video(Path(place), every)


class LiveVideo(Video):
    """A camera or a stream. `frames` yields the newest frame each time: work that is too slow skips some.

    Args:
        place: the camera's number, or the address.
        every: only each `every`-th frame of those that arrive is taken.
        seconds: when it ends; 0: when the stream does.

    Raises:
        InputError: it cannot be opened.
    """

    def __init__(self, place: str, every: int = 1, seconds: float = 0.0) -> None:
        self.place = _STREAM.sub(r"\1://", place, count=1)
        self.file, self.every, self.seen, self.count, self.seconds = Path(place), every, 0, 0, seconds
        self._capture = cv2.VideoCapture(int(place) if place.isdecimal() else self.place)
        if not self._capture.isOpened():
            what = f"camera {place}" if place.isdecimal() else f"stream {self.place}"
            raise InputError(f"{what} cannot be opened; is it there, and does no other program use it?")
        self.rate = capture_rate(self._capture) / every
        self._newest: VideoFrame | None = None
        self._arrived = threading.Condition()
        self._ended = False

    def __exit__(self, *_: object) -> None:
        self._ended = True
        if self._reader is not None:
            self._reader.join(PATIENCE)
        self._capture.release()

    _reader: threading.Thread | None = None

    def frames(self) -> Iterator[VideoFrame]:
        """Yields the newest frame whenever asked, and ends with the stream or after `seconds`."""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        begun = time.monotonic()
        while not self.seconds or time.monotonic() - begun < self.seconds:
            with self._arrived:
                came = self._arrived.wait_for(lambda: self._newest is not None or self._ended, PATIENCE)
                frame, self._newest = self._newest, None
            if frame is None:
                if not came:
                    raise InputError(f"{self.place} sends nothing for {PATIENCE:g} seconds; it has ended")
                return
            self.seen += 1
            yield frame

    def _read(self) -> None:
        """Takes all frames, so that none waits in a queue, and keeps the newest."""
        begun, number = time.monotonic(), -1
        while not self._ended and self._capture.grab():
            number += 1
            if number % self.every:
                continue
            there, image = self._capture.retrieve()
            if not there:
                break
            pixels = np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), np.uint8)
            with self._arrived:
                self._newest = VideoFrame(pixels, number, time.monotonic() - begun)
                self._arrived.notify()
        with self._arrived:
            self._ended = True
            self._arrived.notify()

    def shortfall(self) -> str:
        """Returns what is wrong when no frame came; else ""."""
        return "" if self.seen else f"{self.place} sent no frame"
