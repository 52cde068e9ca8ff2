"""The loop that reads, resizes and batches: what it skips, how it groups, and that all get equal batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import regionclip as package
from clip_base.runtime.errors import InputError
from regionclip.data import batches
from regionclip.data.batches import ReadGroup, read_annotated, read_batches, read_upright
from regionclip.structures.transforms import ResizeConfig

CPU = torch.device("cpu")
RESIZE = ResizeConfig([64], 96)
# (height, width), and the EXIF orientation of the file: 6 turns a wide image upright.
SHAPES = [(60, 90), (90, 60), (64, 64), (60, 90), (80, 60), (50, 90), (70, 60)]
ROTATED = 3

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of several shapes, of which one is rotated by its EXIF orientation."""
    (tmp_path / "photos").mkdir()
    noise = np.random.default_rng(0)
    for number, (height, width) in enumerate(SHAPES):
        image = Image.fromarray(noise.integers(0, 255, (height, width, 3), dtype=np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6 if number == ROTATED else 1
        image.save(tmp_path / "photos" / f"{number}.png", exif=exif)
    return tmp_path / "photos"


def groups_of(files: list[Path], size: int = 4, **options: Any) -> list[ReadGroup[tuple[int, Path]]]:
    def read(item: tuple[int, Path]) -> batches.DecodedImage:
        return read_upright(item[1], item[0])

    return list(read_batches(enumerate(files), read, RESIZE, size, CPU, **options))


def test_wide_and_upright_images_of_a_group_are_batches_of_their_own(folder: Path) -> None:
    first, second = groups_of(sorted(folder.iterdir()))
    assert [[item[0] for item in batch.items] for batch in first.batches] == [[0, 2], [1, 3]]
    assert [[item[0] for item in batch.items] for batch in second.batches] == [[5], [4, 6]]
    assert [tuple(batch.images.pixels.shape[2:]) for batch in first.batches] == [(64, 96), (96, 64)]
    assert first.batches[1].infos[1].height == 90  # as people see it
    assert (first.count, second.count) == (4, 3)


def test_results_come_back_in_the_order_of_the_list(folder: Path) -> None:
    (group,) = groups_of(sorted(folder.iterdir()), size=7, keep_pixels=True)
    found = group.map(lambda batch: [info.image_id for info in batch.infos])
    assert [item[0] for item, _, _ in found] == [result for _, _, result in found] == list(range(7))
    sizes = [pixels.shape[:2] for _, pixels, _ in found if pixels is not None]
    assert sizes == [shape if number != ROTATED else shape[::-1] for number, shape in enumerate(SHAPES)]


def test_an_unreadable_image_is_one_skip_with_its_reason_and_moves_no_other(folder: Path) -> None:
    files = sorted(folder.iterdir())
    files[1].write_bytes(b"no image")
    skipped: list[tuple[int, str]] = []
    first, second = groups_of(files, on_skip=lambda item, reason: skipped.append((item[0], reason)))
    assert [number for number, _ in skipped] == [1]
    assert "1.png does not decode" in skipped[0][1]
    assert [[item[0] for item in batch.items] for batch in first.batches] == [[0, 2], [3]]
    assert [[item[0] for item in batch.items] for batch in second.batches] == [[5], [4, 6]]
    assert first.count == 4
    with pytest.raises(InputError, match=r"1\.png does not decode"):
        groups_of(files)


def test_annotated_images_are_read_in_the_frame_of_their_boxes(folder: Path) -> None:
    path = folder / f"{ROTATED}.png"
    assert read_annotated(1, path, (60, 90)).pixels.shape == (60, 90, 3)  # as stored
    assert read_annotated(1, path, (90, 60)).pixels.shape == (90, 60, 3)  # rotated
    assert read_annotated(1, path, None).size == (90, 60)
    with pytest.raises(InputError, match="its annotations say 10x10; has it been resized"):
        read_annotated(1, path, (10, 10))


@pytest.fixture
def padded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[tuple[int, ...], str]]]:
    """Takes the shape and the content of each batch that is made."""
    made: list[tuple[tuple[int, ...], str]] = []
    real = batches.to_batch

    def to_batch(*arguments: Any) -> Any:
        batch = real(*arguments)
        made.append((tuple(batch.pixels.shape), f"{float(batch.pixels.double().sum()):.6f}"))
        return batch

    monkeypatch.setattr(batches, "to_batch", to_batch)
    return made


def test_detect_features_and_python_pad_a_folder_alike(
    folder: Path,
    padded: list[tuple[tuple[int, ...], str]],
    detector_file: Path,
    tmp_path: Path,
    regionclip: Command,
) -> None:
    shared = [f"weights={detector_file}", "vocabulary=cup, star", "precision=fp32", "batch_size=3"]
    assert regionclip("detect", folder, *shared, f"out={tmp_path / 'found'}", "draw=false")[0] == 0
    detected = padded.copy()
    assert len({shape for shape, _ in detected}) > 1
    padded.clear()
    assert regionclip("features", folder, *shared, f"out={tmp_path / 'features'}")[0] == 0
    assert padded == detected
    padded.clear()
    predictor = package.load(detector_file, vocabulary="cup, star", precision="fp32")
    predictor.detect_many(folder, batch_size=3)
    assert padded == detected
    padded.clear()
    predictor.image_features(folder, batch_size=3)
    assert padded == detected
