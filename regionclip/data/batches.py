"""The one loop that reads, resizes and batches images, for mining, detection, features and evaluation."""

# B images of a batch, H, W height and width
from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

import torch

from clip_base.data.batch import ImageBatch
from clip_base.images.decode import Pixels, decode
from clip_base.images.headers import Stored
from clip_base.images.inputs import ImageLike, read_image
from clip_base.images.orientation import turned_as_annotated, turned_upright
from clip_base.jobs.skipped import require_usable, write_skipped
from clip_base.runtime.errors import InputError
from clip_base.runtime.workers import cores, in_turn
from clip_base.storage.remote import RemoteError
from regionclip.data.annotations import CocoDetection, ImageAnnotations
from regionclip.structures.regions import ImageInfo
from regionclip.structures.transforms import ResizeConfig, ResizeTransform, resize_shortest_edge, to_batch

READERS = min(8, cores())  # threads that decode and resize ahead
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class DecodedImage:
    """An image as a reader returns it.

    Attributes:
        image_id: its id, for proposers that look boxes up.
        pixels: [h, w, 3] uint8 RGB.
        size: (H, W) that boxes refer to; larger than `pixels` when a very large image was reduced.
        file_name: its path, for the same proposers; "": an image in memory.
        key: what identifies it in its source, see `CaptionedImageEntry`; "": its id alone does.
    """

    image_id: int
    pixels: Pixels
    size: tuple[int, int]
    file_name: str = ""
    key: str = ""


def read_annotated(
    image_id: int, path: Path | Stored, size: tuple[int, int] | None, key: str = ""
) -> DecodedImage:
    """Reads an image in the frame of its annotations.

    Args:
        image_id: its id in the annotations.
        path: its file.
        size: (height, width) as annotated, which decides whether the image is rotated by its EXIF
            orientation, see `turned_as_annotated`; None: it is not stated, and the image is upright.
        key: what identifies it in its source.

    Raises:
        InputError: the file is missing, does not decode, or has another size than annotated.
    """
    pixels = decode(path)
    pixels = turned_upright(pixels, path) if size is None else turned_as_annotated(pixels, path, size)
    return DecodedImage(image_id, pixels, (pixels.shape[0], pixels.shape[1]), str(path), key)


def read_record(record: ImageAnnotations) -> DecodedImage:
    """Reads an annotated image of a dataset; see `read_annotated`."""
    return read_annotated(record.image_id, record.path, (record.height, record.width))


def read_upright(image: ImageLike, image_id: int) -> DecodedImage:
    """Reads an image without annotations as people see it: a file is rotated by its EXIF orientation.

    Args:
        image: a path, or an image in memory.
        image_id: the id that it gets.

    Raises:
        InputError: a file is missing or does not decode, or the object is no image.
    """
    name = str(image) if isinstance(image, str | Path) else ""
    return DecodedImage(image_id, *read_image(image), name)


@dataclass(frozen=True)
class LoadedBatch(Generic[Item]):
    """Images of one orientation, resized and padded to one size.

    Attributes:
        items: the B items that they were read from.
        images: their pixels.
        transforms: where each is in the batch's frame.
        infos: their ids and original sizes.
        pixels: [h, w, 3] each, as decoded; None unless they are kept.
    """

    items: list[Item]
    images: ImageBatch
    transforms: list[ResizeTransform]
    infos: list[ImageInfo]
    pixels: list[Pixels | None]


@dataclass(frozen=True)
class ReadGroup(Generic[Item]):
    """The batches of `batch_size` items that follow each other in the list.

    Attributes:
        batches: none to two: the wide images, and the upright ones.
        places: for each batch, where its images are in the group.
        count: items read, those that were skipped included.
    """

    batches: list[LoadedBatch[Item]]
    places: list[list[int]]
    count: int

    def map(
        self, compute: Callable[[LoadedBatch[Item]], Sequence[Result]]
    ) -> list[tuple[Item, Pixels | None, Result]]:
        """Returns (item, pixels, result) for each readable image, in the order of the list.

        Args:
            compute: returns one result for each image of a batch.
        """
        found: dict[int, tuple[Item, Pixels | None, Result]] = {}
        for batch, places in zip(self.batches, self.places, strict=True):
            results = zip(batch.items, batch.pixels, compute(batch), strict=True)
            found |= zip(places, results, strict=True)
        return [found[place] for place in sorted(found)]


@dataclass(frozen=True)
class _Resized:
    """An image in its frame; `decoded` as it was before, when that is kept."""

    info: ImageInfo
    pixels: Pixels
    transform: ResizeTransform
    decoded: Pixels | None


def read_batches(
    items: Iterable[Item],
    read: Callable[[Item], DecodedImage],
    resize: ResizeConfig,
    batch_size: int,
    device: torch.device,
    on_skip: Callable[[Item, str], None] | None = None,
    keep_pixels: bool = False,
) -> Iterator[ReadGroup[Item]]:
    """Reads, resizes and batches images, while threads read ahead.

    Each `batch_size` items that follow each other make at most two batches: wide images (square ones too) and
    upright ones, which padded to one size would all become squares. So batches depend on the list, on
    `batch_size` and on `resize` alone, and the same list is padded alike by everything that reads it.

    Args:
        items: what to read; taken as it is needed.
        read: stands on `read_annotated` or `read_upright`.
        resize: the first of its short sides is used.
        batch_size: items per group, and so the most images per batch.
        device: where the pixels go.
        on_skip: takes each item that cannot be read with the reason, before its group is yielded; None: such
            an item is an error.
        keep_pixels: whether to keep the decoded images, to draw on.

    Raises:
        InputError: `batch_size` is below 1, or an item cannot be read and there is no `on_skip`.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, found {batch_size}")

    def load(item: Item) -> tuple[Item, _Resized | InputError]:
        try:
            decoded = read(item)
        except RemoteError:  # says nothing about the image
            raise
        except InputError as error:
            return item, error
        return item, _resized(decoded, resize, keep_pixels)

    stream = in_turn(load, items, READERS)
    while some := list(itertools.islice(stream, batch_size)):
        shapes: dict[bool, list[tuple[int, Item, _Resized]]] = {False: [], True: []}
        for place, (item, loaded) in enumerate(some):
            if not isinstance(loaded, InputError):
                height, width = loaded.info.height, loaded.info.width
                shapes[height > width].append((place, item, loaded))
            elif on_skip is None:
                raise loaded
            else:
                on_skip(item, str(loaded))
        alike = [group for group in shapes.values() if group]
        batches = [
            _batch([item for _, item, _ in group], [loaded for _, _, loaded in group], resize, device)
            for group in alike
        ]
        yield ReadGroup(batches, [[place for place, _, _ in group] for group in alike], len(some))


def batch_of(
    images: Sequence[DecodedImage], resize: ResizeConfig, device: torch.device
) -> LoadedBatch[DecodedImage]:
    """Resizes images that are in memory and pads them into one batch, as `read_batches` does."""
    return _batch(images, [_resized(image, resize, True) for image in images], resize, device)


def _resized(image: DecodedImage, resize: ResizeConfig, keep_pixels: bool) -> _Resized:
    pixels, transform = resize_shortest_edge(image.pixels, resize.short[0], resize.long, filter=resize.filter)
    info = ImageInfo(image.image_id, *image.size, image.file_name, image.key)
    transform = replace(transform, original=image.size)
    return _Resized(info, pixels, transform, image.pixels if keep_pixels else None)


def _batch(
    items: Sequence[Item], loaded: Sequence[_Resized], resize: ResizeConfig, device: torch.device
) -> LoadedBatch[Item]:
    return LoadedBatch(
        list(items),
        to_batch([one.pixels for one in loaded], resize.multiple).to(device),
        [one.transform for one in loaded],
        [one.info for one in loaded],
        [one.decoded for one in loaded],
    )


def note_skipped(path: Path, skipped: Mapping[int, str], dataset: CocoDetection, max_skipped: float) -> None:
    """Writes one line for every image that could not be read: its id and the reason. None: no file.

    Raises:
        JobError: they and the images that are not in the folder are more than the share `max_skipped`.
    """
    if skipped:
        write_skipped(path, ({"image_id": key, "reason": reason} for key, reason in skipped.items()))
    reasons = [*skipped.values(), *(f"image {file} does not exist" for file in dataset.missing)]
    total = len(dataset) + len(dataset.missing)
    require_usable(reasons, total, max_skipped, path if skipped else None)
