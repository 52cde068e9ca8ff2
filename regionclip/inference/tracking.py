"""Tracks: which detections of a video's frames are one thing, by ByteTrack (arXiv 2110.06864)."""

# N detections of a frame
from __future__ import annotations

from typing import Any

import numpy as np

from clip_base.runtime.errors import InputError
from regionclip.structures.detections import Detections


class Tracker:
    """Numbers the things in a video, frame by frame.

    Args:
        rate: frames a second, of those that it will see.
        threshold: score from which a detection begins a track; lower ones only continue one.

    Raises:
        InputError: no package with ByteTrack is installed.
    """

    def __init__(self, rate: float, threshold: float) -> None:
        self._tracker = _byte_track(rate, threshold)

    def __call__(self, found: Detections) -> list[int | None]:
        """Returns the number of each of the next frame's detections, None for one that is in no track."""
        numbers: list[int | None] = [None] * len(found)
        given = found.to_supervision()
        given.data["row"] = np.arange(len(found))
        update = getattr(self._tracker, "update_with_detections", None) or self._tracker.update
        tracked = update(given)
        if tracked.tracker_id is not None and len(tracked):
            for row, number in zip(tracked.data["row"].tolist(), tracked.tracker_id.tolist(), strict=True):
                numbers[row] = number + 1 if number >= 0 else None
        return numbers


def _byte_track(rate: float, threshold: float) -> Any:
    """Returns supervision's ByteTrack; newer versions have left it to the package trackers."""
    frames = max(round(rate), 1)
    try:
        import supervision  # noqa: PLC0415 (optional)

        older = getattr(supervision, "ByteTrack", None)
        if older is not None:
            return older(track_activation_threshold=threshold, frame_rate=frames)
        from trackers import ByteTrackTracker  # noqa: PLC0415 (optional)
    except ImportError:
        raise InputError("track=true needs ByteTrack: pip install 'regionclip[track]'") from None
    return ByteTrackTracker(
        frame_rate=frames, track_activation_threshold=threshold, high_conf_det_threshold=threshold
    )
