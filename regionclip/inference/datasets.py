"""Detections as a labeled dataset for training another detector."""

# N boxes of an image
from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from clip_base.images.video import VIDEOS
from clip_base.jobs import plugins
from clip_base.jobs.resume_log import ResumeLog
from clip_base.runtime.errors import InputError
from regionclip.structures.labels import LABEL_FILES, LABEL_WRITERS, LabeledImage, LabelTarget, write_labels


@dataclass(frozen=True)
class Dataset:
    """Where labels go, and in which format.

    Attributes:
        format: the label writer's name.
        target: see `LabelTarget`.
    """

    format: str
    target: LabelTarget


def planned_datasets(
    formats: Sequence[str], out: Path, names: Sequence[str], files: Sequence[Path], info: dict[str, Any]
) -> list[Dataset]:
    """Returns the datasets to write in `out/FORMAT`; what stands in their way is found before any work.

    Args:
        formats: names of label writers.
        out: the job's folder.
        names: the categories.
        files: the images; the datasets' file names are relative to the folder that all of them are in.
        info: what decides the labels.

    Raises:
        InputError: no such writer, a video among the files, or labels of another run.
    """
    if not formats:
        return []
    video = next((file for file in files if file.suffix.lower() in VIDEOS), None)
    if video is not None:
        raise InputError(f"format= labels images, and {video} is a video; leave videos or format= out")
    folder = images_folder(files)
    planned = []
    for name in formats:
        place = out / name / LABEL_FILES.get(name, "")
        planned.append(Dataset(name, LabelTarget(place, names, str(folder), info)))
        plugins.load(LABEL_WRITERS, name)(planned[-1].target).is_complete()
    return planned


def images_folder(files: Sequence[Path]) -> Path:
    """Returns the folder that all files are in."""
    return Path(os.path.commonpath([file.absolute().parent for file in files]))


def write_datasets(datasets: Sequence[Dataset], journal: ResumeLog, threshold: float) -> Iterator[str]:
    """Writes the datasets from a run's journal; yields a line on each.

    Args:
        datasets: see `planned_datasets`.
        journal: with entries `image` and `found`, those of one image together.
        threshold: detections that score less are left out.
    """
    for dataset in datasets:
        images = labeled_images(journal, Path(dataset.target.images_folder), threshold)
        write_labels(dataset.format, dataset.target, images)
        yield f"{dataset.target.out}: labels of at least {threshold:g}, format {dataset.format}"


def labeled_images(journal: ResumeLog, folder: Path, threshold: float) -> Iterator[LabeledImage]:
    """Yields the images of a journal with their detections of at least `threshold`, which may be none."""
    groups = groupby(journal.entries("found"), key=lambda entry: int(entry["image_id"]))
    ahead = next(groups, None)
    for image in journal.entries("image"):
        entries = []
        if ahead is not None and ahead[0] == image["image_id"]:
            entries = [entry for entry in ahead[1] if entry["score"] >= threshold]
            ahead = next(groups, None)
        yield LabeledImage(
            image_id=image["image_id"],
            file_name=str(Path(image["file_name"]).absolute().relative_to(folder)),
            height=image["height"],
            width=image["width"],
            boxes=[[x, y, x + width, y + height] for x, y, width, height in (e["bbox"] for e in entries)],
            labels=[entry["category_id"] - 1 for entry in entries],
            scores=[entry["score"] for entry in entries],
        )
