"""The job `detect`: detection by name in images and videos."""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from clip_base.images.decode import Pixels
from clip_base.images.folders import IMAGE_SUFFIXES
from clip_base.images.inputs import image_files
from clip_base.images.live import is_live, open_video
from clip_base.images.video import CODECS, VIDEOS, Video, VideoFrame, writing_video
from clip_base.jobs.config import REQUIRED, option
from clip_base.jobs.everyday import everyday
from clip_base.jobs.resume_log import ResumeLog
from clip_base.jobs.run import hashes_of
from clip_base.jobs.skipped import max_skipped_option, require_share, require_usable, write_skipped
from clip_base.runtime.errors import InputError, note
from clip_base.runtime.progress import Progress, rate
from clip_base.storage.hashing import text_hash
from clip_base.storage.lock import lock_folder
from regionclip.checkpoints import zoo
from regionclip.data.batches import DecodedImage, LoadedBatch, read_batches, read_upright
from regionclip.data.categories import parse_names
from regionclip.inference.datasets import planned_datasets, write_datasets
from regionclip.inference.detection_files import is_moving, targets_of, write_detections
from regionclip.inference.options import VOCABULARY_HELP, DetectorOptions
from regionclip.inference.predictor import Predictor
from regionclip.inference.region_query import QUERY_HELP, parse_queries, vocabulary_of
from regionclip.inference.tracking import Tracker
from regionclip.structures.detections import Detections
from regionclip.structures.drawing import draw, save_image

JOURNAL, SKIPPED = ".detections.jsonl", "skipped.jsonl"
Likely = list[list[tuple[str, float]]]


@everyday(
    'detect sample:coffee vocabulary="cup, spoon" out=found',
    input="images vocabulary",
    output="out format draw",
    model="weights proposer.name",
    quality="score_threshold top_k",
    speed="batch_size device",
)
@dataclass
class DetectConfig(DetectorOptions):
    """Options of detection in images and videos."""

    images: list[str] = option(
        REQUIRED,
        "images, videos, folders of them, quoted patterns such as 'photos/**/*.jpg', sample:cat, "
        "sample:coffee, sample:astronaut; a camera by number (0), or a stream's address (rtsp://…)",
        positional=True,
        renamed_from="photos",
    )
    vocabulary: str = option("", f"{VOCABULARY_HELP}; or give query=")
    query: str = option("", QUERY_HELP)
    weights: str = option(
        zoo.DETECTOR,
        "a detector (ours or RegionCLIP's), or a CLIP (then give a proposer); by default RegionCLIP's "
        "published detector, which is downloaded once",
    )
    out: str = option(
        "detections",
        "folder for drawn images, detections.json (COCO's results format) and detections.csv",
        runtime_only=True,
    )
    score_threshold: float = option(
        0.3, "boxes with lower scores are not drawn; the files still contain them", renamed_from="score"
    )
    top_k: int = option(
        0,
        "number of most probable names stored and printed for each region; 0: none",
        renamed_from="top",
    )
    format: list[str] = option(
        [],
        "datasets to write as well, from boxes of at least score_threshold, in out/FORMAT: coco, yolo, voc, "
        "csv, fiftyone, or another label writer that is installed",
    )
    draw: bool = option(True, "draw boxes; false: only detections.json and detections.csv")
    track: bool = option(
        False, "videos: number the things that frames show (ByteTrack; pip install 'regionclip[track]')"
    )
    stream_seconds: float = option(
        0.0, "cameras and streams: stop after this time; 0: at Ctrl-C, which keeps what was found"
    )
    multi_label: bool = option(
        False, "return a region under every name that it scores with, not under its best alone"
    )
    nms_across_names: float = option(
        1.0, "IoU above which the lower scored of two boxes of different names is dropped; 1: none is"
    )
    max_drawn: int = option(
        30, "boxes drawn per image, those of the highest scores, so that they can be told apart; 0: all"
    )
    frame_stride: int = option(1, "videos: process and write every n-th frame", renamed_from="every")
    max_skipped: float = max_skipped_option()
    video_codec: str = option(
        "mp4v",
        "videos: mp4v for VLC, QuickTime and Windows; vp09 also for browsers, slower to write; avc1 "
        "(H.264) for all, where OpenCV has an encoder for it",
        choices=CODECS,
        renamed_from="codec",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.vocabulary) == bool(self.query):
            raise InputError(
                'give either vocabulary="cat, dog", names to detect, or query=IMAGE:x1,y1,x2,y2, a region to '
                "look for"
            )
        if self.query and self.embeddings:
            raise InputError("embeddings= are of names, and query= looks for a region; omit one of them")
        if self.vocabulary and not self.text_weights and not self.embeddings:
            self.text_weights = zoo.text_tower(self.weights, parse_names(self.vocabulary))
        require_share(self.max_skipped)
        if not 0 <= self.nms_across_names <= 1:
            raise InputError(f"nms_across_names must be in [0, 1], found {self.nms_across_names}")
        if self.frame_stride < 1 or min(self.top_k, self.max_drawn) < 0 or not 0 <= self.score_threshold <= 1:
            raise InputError(
                f"frame_stride={self.frame_stride} must be at least 1, top_k={self.top_k} and "
                f"max_drawn={self.max_drawn} not negative, "
                f"score_threshold={self.score_threshold} in [0, 1]"
            )
        if not 0 <= self.stream_seconds < float("inf"):
            raise InputError(f"stream_seconds={self.stream_seconds} must be 0 or more")


@dataclass(frozen=True)
class Source:
    """An image's or a video's file, and where it goes with boxes drawn."""

    file: Path
    target: Path

    @property
    def is_video(self) -> bool:
        """Whether it is a camera or a stream, or its file ends as videos do."""
        return is_moving(self.file)


def detect(config: DetectConfig) -> None:
    """Detects things by name in images and videos; draws boxes, writes detections.json and detections.csv.

    Images that could not be read are listed in skipped.jsonl. A stopped run resumes with the same command
    after the last finished batch of images or video. A finished run is repeated.
    """
    live = [place for place in config.images if is_live(place)]
    places = [place for place in config.images if place not in live]
    files = image_files(places, IMAGE_SUFFIXES.union(VIDEOS)) if places else []
    files += [Path(place) for place in live]
    if config.track:
        Tracker(25, config.score_threshold)  # told before any image is read
    out = Path(config.out)
    sources = [Source(*pair) for pair in zip(files, targets_of(files, out), strict=True)]
    stills = [source for source in sources if not source.is_video]
    videos = [source for source in sources if source.is_video]
    queries = parse_queries(config.query) if config.query else []
    names = list(dict.fromkeys(q.name for q in queries)) or parse_names(config.vocabulary)
    zoo.fetch_detector(config.weights, config.text_weights)
    header = _header(config, names, files) | hashes_of({f"query {q.image}": q.image for q in queries})
    datasets = planned_datasets(config.format, out, names, files, header)
    with contextlib.ExitStack() as closing:
        closing.enter_context(lock_folder(out))
        predictor = config.predictor(multi_label=config.multi_label)
        if queries:
            predictor.set_vocabulary(vocabulary_of(predictor, queries))
        else:
            predictor.set_vocabulary(names, config.embeddings)
        journal = closing.enter_context(ResumeLog(out / JOURNAL, header))
        batches = -(-len(stills) // config.batch_size)
        stills = stills[journal.units * config.batch_size :]
        videos = videos[max(journal.units - batches, 0) :]
        before, begun = journal.images, time.monotonic()
        if before:
            print(f"{out}: {before} images were processed before; resuming after them")
        total = before + len(stills) + sum(_frames(video, config.frame_stride) for video in videos)
        with Progress("detecting", total, before) as progress:
            runner = DetectionRunner(config, predictor, journal, progress)
            runner.process_images(stills)
            for video in videos:
                runner.process_video(video)
        speed = rate(journal.images - before, time.monotonic() - begun)
        count = write_detections(out, partial(journal.entries, "found"), config.top_k)
        for told in write_datasets(datasets, journal, config.score_threshold):
            print(told)
        skipped = list(journal.entries("skipped"))
        (out / SKIPPED).unlink(missing_ok=True)
        if skipped:
            write_skipped(out / SKIPPED, skipped)
        journal.remove()
    unread = sum(not is_moving(Path(entry["file_name"])) for entry in skipped)
    print(f"{out}: {count} detections in {journal.images - unread} images, {speed}")
    if skipped:
        reasons = [entry["reason"] for entry in skipped]
        require_usable(reasons, len(files), config.max_skipped, out / SKIPPED)
        note(f"{len(skipped)} of {len(files)} images could not be read, see {out / SKIPPED}: {reasons[0]}")


def _header(config: DetectConfig, names: Sequence[str], files: Sequence[Path]) -> dict[str, Any]:
    """Returns what decides the result, by what it is called to the user."""
    return {
        **config.identity(),
        "names": list(names),
        "list of images": text_hash(files),
        **hashes_of({f"content of {what}": path for what, path in config.inputs().items()}),
    }


def _frames(video: Source, every: int) -> int:
    """Returns how many frames will be looked at, as far as the file tells."""
    if is_live(str(video.file)):
        return 0
    try:
        with Video(video.file, every) as opened:
            return opened.count
    except InputError:
        return 0


def _read(item: tuple[int, Source]) -> DecodedImage:
    return read_upright(item[1].file, item[0])


@dataclass
class DetectionRunner:
    """Looks at images and videos, and notes in the journal what it finds."""

    config: DetectConfig
    predictor: Predictor
    journal: ResumeLog
    progress: Progress

    def process_images(self, sources: Sequence[Source]) -> None:
        """Looks at images in batches; one that cannot be read is noted."""
        groups = read_batches(
            enumerate(sources, self.journal.images + 1),
            _read,
            self.predictor.resize,
            self.config.batch_size,
            self.predictor.device,
            on_skip=lambda item, reason: self._skip(item[1], reason),
            keep_pixels=True,
        )
        for group in groups:
            for (image_id, source), pixels, found in group.map(self._detect_loaded):
                assert pixels is not None
                self._write(found, pixels, source, image_id)
            self.journal.end(group.count)
            self.progress.advance(group.count)

    def _write(self, found: Detections, pixels: Pixels, source: Source, image_id: int) -> None:
        if self.config.format:  # what a dataset needs of images without detections, too
            height, width = found.size
            place = {"image_id": image_id, "file_name": str(source.file)}
            self.journal.add("image", {**place, "height": height, "width": width})
        likely = self._note(found, pixels, image_id, {"file_name": str(source.file)})
        shown = found.with_min_score(self.config.score_threshold)
        if self.config.draw:
            save_image(draw(pixels, self._drawn(shown)), source.target)
        print(f"{source.target if self.config.draw else source.file}: {shown!r}")
        for index, ranked in enumerate(likely):
            score = float(found.scores[index])
            if score >= self.config.score_threshold:
                corners = ", ".join(f"{side:.0f}" for side in found.boxes[index].tolist())
                others = ", ".join(f"{name} {probability:.2f}" for name, probability in ranked)
                print(f"  {found.names[int(found.labels[index])]} {score:.2f} at ({corners}): {others}")

    def _detect_loaded(self, batch: LoadedBatch[Any]) -> list[Detections]:
        threshold = self.config.nms_across_names
        return [found.with_nms(threshold) for found in self.predictor.detect_loaded(batch)]

    def _drawn(self, shown: Detections) -> Detections:
        """Returns what is drawn of what may be shown; says once that there was more."""
        limit = self.config.max_drawn
        if not limit or len(shown) <= limit:
            return shown
        note(
            f"images with more than {limit} boxes show the {limit} of the highest scores; the files have all"
        )
        return shown.top(limit)

    def process_video(self, source: Source) -> None:
        """Looks at a video in batches of frames; one that does not decode, or not to its end, is noted."""
        try:
            video = open_video(str(source.file), self.config.frame_stride, self.config.stream_seconds)
        except InputError as error:
            self._skip(source, str(error))
            self.journal.end(0)
            return
        names, live = Counter[str](), is_live(str(source.file))
        tracker = Tracker(video.rate, self.config.score_threshold) if self.config.track else None
        drawn = writing_video(source.target, video.rate, self.config.video_codec)
        with video, drawn if self.config.draw else contextlib.nullcontext() as writer:
            stream = video.frames()
            try:
                while frames := list(itertools.islice(stream, 1 if live else self.config.batch_size)):
                    for frame, shown, texts in self._look_at_frames(frames, source, video, tracker):
                        names.update({shown.names[label] for label in shown.labels.tolist()})
                        if writer is not None:
                            drawn_ones = self._drawn(shown)  # best first, as the texts are
                            texts = texts[: len(drawn_ones)]
                            writer.add(draw(frame.pixels, drawn_ones, texts=texts))
                    self.progress.advance(len(frames), source.file.name)
            except KeyboardInterrupt:
                if not live:
                    raise
                print(f"{source.file} was left; what was found is kept", file=sys.stderr)
        if video.shortfall():
            self._skip(source, video.shortfall())
        self.journal.end(video.seen)
        told = ", ".join(f"{name} in {count}" for name, count in names.most_common(5)) or "nothing found"
        print(f"{source.target if self.config.draw else source.file}: {video.seen} frames, {told}")

    def _look_at_frames(
        self, frames: Sequence[VideoFrame], source: Source, video: Video, tracker: Tracker | None
    ) -> Iterator[tuple[VideoFrame, Detections, list[str]]]:
        """Yields each frame, and the boxes and texts to draw on it; the journal takes all that was found."""
        batch = [(frame.pixels, (frame.pixels.shape[0], frame.pixels.shape[1])) for frame in frames]
        first = self.journal.images + 1 + video.seen - len(frames)
        for slot, found in enumerate(self.predictor.detect_batch(batch, first)):
            found = found.with_nms(self.config.nms_across_names)
            frame = frames[slot]
            where = {"file_name": str(source.file), "frame": frame.number, "time": round(frame.time, 3)}
            tracks = tracker(found) if tracker else [None] * len(found)
            self._note(found, frame.pixels, first + slot, where, tracks)
            rows = (found.scores >= self.config.score_threshold).nonzero().flatten().tolist()
            shown = found[rows]
            numbers = ["" if tracks[row] is None else f"#{tracks[row]} " for row in rows]
            yield frame, shown, [number + text for number, text in zip(numbers, shown.captions, strict=True)]

    def _note(
        self,
        found: Detections,
        pixels: Pixels,
        image_id: int,
        where: dict[str, Any],
        tracks: Sequence[int | None] = (),
    ) -> Likely:
        """Writes detections into the journal; returns the most probable names of each, none with top_k=0."""
        entries = found.to_coco(image_id, range(1, len(found.names) + 1))
        likely: Likely = []
        if self.config.top_k and len(found):
            boxes = found.resized(pixels.shape[:2]).boxes
            likely = self.predictor.classify_regions(pixels, boxes, self.config.top_k)
        for index, entry in enumerate(entries):
            extra: dict[str, Any] = {"category_name": found.names[entry["category_id"] - 1], **where}
            if tracks and tracks[index] is not None:
                extra["track_id"] = tracks[index]
            if likely:
                extra["top"] = [
                    {"name": name, "probability": round(value, 6)} for name, value in likely[index]
                ]
            self.journal.add("found", {**entry, **extra})
        return likely

    def _skip(self, source: Source, reason: str) -> None:
        self.journal.add("skipped", {"file_name": str(source.file), "reason": reason})
