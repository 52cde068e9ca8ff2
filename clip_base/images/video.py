"""Videos: frames as pixels, with their numbers and times, and images as an MP4."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from clip_base.images.decode import Pixels
from clip_base.runtime.errors import InputError
from clip_base.storage.files import existing, replacing
from clip_base.storage.kinds import kind_of

VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")
CODECS = ("mp4v", "avc1", "vp09")

_USUAL_RATE = 25.0  # frames a second, where a file does not tell


@dataclass(frozen=True, eq=False)
class VideoFrame:
    """A frame of a video.

    Attributes:
        pixels: [H, W, 3] uint8 RGB, rotated as the file says.
        number: counted from 0, left-out frames included.
        time: when it is shown, in seconds.
    """

    pixels: Pixels
    number: int
    time: float


class Video:
    """Reads a video frame by frame; use it in a `with` statement.

    Args:
        file: whatever OpenCV decodes.
        every: only each `every`-th frame is decoded, the first one included.

    Attributes:
        rate: frames a second, of those that are yielded.
        count: how many frames `frames` yields as far as the file tells, which may be wrong; 0: it does not.
        seen: how many frames were yielded.

    Raises:
        InputError: the file is missing, or no video that can be decoded.
    """

    def __init__(self, file: Path, every: int = 1) -> None:
        self.file, self.every, self.seen = existing(file, "video"), every, 0
        self._capture = cv2.VideoCapture(str(file))
        if not self._capture.isOpened():
            kind = kind_of(file)
            what = f"it is {kind}" if kind not in ("", "a video") else "is it a complete video file?"
            raise InputError(f"video {file} cannot be decoded; {what}")
        self.rate = capture_rate(self._capture) / every
        self.count = max(-(-int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)) // every), 0)

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_: object) -> None:
        self._capture.release()

    def frames(self) -> Iterator[VideoFrame]:
        """Yields the frames in order."""
        for number in itertools.count():
            if not self._capture.grab():
                return
            if number % self.every == 0:
                time = max(float(self._capture.get(cv2.CAP_PROP_POS_MSEC)) / 1000, 0.0)
                there, image = self._capture.retrieve()
                if not there:
                    return
                self.seen += 1
                yield VideoFrame(np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), np.uint8), number, time)

    def shortfall(self) -> str:
        """Returns what is wrong when `frames` has ended long before the file tells; else ""."""
        if self.seen and self.seen >= 0.9 * self.count:
            return ""
        return f"video {self.file} ends after {self.seen} of about {self.count} frames; was it truncated?"


def capture_rate(capture: cv2.VideoCapture) -> float:
    """Returns frames a second; a usual number of them where the source does not tell."""
    rate = float(capture.get(cv2.CAP_PROP_FPS))
    return rate if math.isfinite(rate) and rate > 0 else _USUAL_RATE


class VideoWriter:
    """Writes images of one size as the frames of an MP4 without sound; see `writing_video`.

    Args:
        path: the file, which ends in .mp4.
        rate: frames a second.
        codec: one of CODECS.
    """

    def __init__(self, path: Path, rate: float, codec: str) -> None:
        self.path, self.rate, self.codec = path, rate, codec
        self._writer: cv2.VideoWriter | None = None
        self.size = (0, 0)

    def add(self, image: Image.Image) -> None:
        """Appends a frame; sides are made even, as players want them, by leaving out a last row or column.

        Raises:
            InputError: this OpenCV has no encoder for the codec.
        """
        if self._writer is None:
            self.size = (max(image.width // 2 * 2, 2), max(image.height // 2 * 2, 2))
            code = cv2.VideoWriter_fourcc(*self.codec)  # type: ignore[attr-defined]
            self._writer = cv2.VideoWriter(str(self.path), code, self.rate, self.size)
            if not self._writer.isOpened():
                raise InputError(
                    f"this OpenCV cannot encode {self.codec}; give another video_codec= ({', '.join(CODECS)})"
                )
        frame = image.crop((0, 0, *self.size))
        self._writer.write(cv2.cvtColor(np.asarray(frame), cv2.COLOR_RGB2BGR))

    def close(self) -> None:
        """Ends the file."""
        if self._writer is not None:
            self._writer.release()


@contextlib.contextmanager
def writing_video(path: Path, rate: float, codec: str = "mp4v") -> Iterator[VideoWriter]:
    """Yields a writer of `path`; the file appears whole at the end, and not after an error or without frames.

    Args:
        path: the file, which ends in .mp4.
        rate: frames a second.
        codec: "mp4v" (MPEG-4 Part 2: VLC, QuickTime, Windows), "vp09" (VP9: browsers as well, slow to write),
            "avc1" (H.264: everywhere, where OpenCV brings an encoder for it).
    """
    with contextlib.suppress(_EmptyError), replacing(path) as temporary:
        part = temporary.with_name(f"{temporary.name}.mp4")  # the ending says what is to be written
        writer = VideoWriter(part, rate, codec)
        try:
            yield writer
            writer.close()
            if not part.exists():
                raise _EmptyError
            part.replace(temporary)
        finally:
            writer.close()
            part.unlink(missing_ok=True)


class _EmptyError(Exception):
    """No frame was written."""
