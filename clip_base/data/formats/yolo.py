"""YOLO: one text file per image, a line `class center_x center_y width height` per box, in shares.

`annotations=DATA/labels/val` is a folder of labels, with the names in the nearest `data.yaml` (or
`classes.txt`) of it and the folders above. `annotations=DATA/data.yaml#val` is what the file names `val`;
without `#`, a `data.yaml` with one split is meant. A split is a folder of images, or a text file that lists
some, one per line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from clip_base.data.formats.instances import Instances, around, number_of
from clip_base.images.folders import IMAGE_SUFFIXES, list_files
from clip_base.images.orientation import upright_size
from clip_base.runtime.errors import InputError, note, quote
from clip_base.storage.files import existing, is_file, is_folder, read_text
from clip_base.storage.tables import read_class_list, read_yaml

SPLITS = ("train", "val", "test")
YAML = (".yaml", ".yml")
LISTS = ("classes.txt", "obj.names", "_darknet.labels")
LIST = ".txt"
SLACK = 1e-3  # shares are rounded; a box may leave its image by so much


def read_yolo(path: Path) -> dict[str, Any] | None:
    """Returns YOLO's labels in COCO's format; None when `path` is neither a `data.yaml` nor such a folder.

    Image names are relative to the folder of the images, which is the labels' with `images` in the place of
    `labels`, or the labels' own. Images without a file of labels hold no object. Polygons become the boxes
    around them.

    Raises:
        InputError: there are no names, no images, or a line is malformed.
    """
    file, _, split = str(path).partition("#")
    listed: list[Path] | None = None
    if Path(file).suffix.lower() in YAML:
        names, content = _names(Path(file))
        place = _split_place(Path(file), content, split)
        if place.suffix == LIST:
            listed = _listed(place, _root(Path(file), content))
            place = _folder_of(listed, place)
        labels = _labels_of(place)
    elif path.is_dir() and list_files(path, (".txt",), what="annotations folder").files:
        source = _names_file(path)
        names, content = _names(source)
        labels = path
    else:
        return None
    folder = _images_of(labels)
    images = list_files(folder, IMAGE_SUFFIXES).files if listed is None else listed
    if not images:
        raise InputError(f"{path}: {folder} holds no images, whose sizes YOLO's labels need")
    instances, strangers = Instances(str(path), names), {file.relative_to(labels) for file in _texts(labels)}
    for image in images:
        relative = image.relative_to(folder)
        text = relative.with_suffix(".txt")
        height, width = upright_size(image)
        image_id = instances.add_image(str(relative), (height, width))
        if text in strangers:
            strangers.discard(text)
            for name, box in _boxes(labels / text, names, "kpt_shape" in content):
                x1, y1, x2, y2 = box
                corners = (x1 * width, y1 * height, x2 * width, y2 * height)
                instances.add_box(image_id, name, corners, str(labels / text))
    if strangers and listed is None:
        note(f"{path}: {len(strangers):,} files of labels, such as {min(strangers)}, have no image")
    return instances.to_coco()


def _texts(labels: Path) -> list[Path]:
    return [file for file in list_files(labels, (".txt",)).files if file.name not in LISTS]


def _names_file(labels: Path) -> Path:
    """Returns the file with the names that belongs to a folder of labels."""
    for folder in (labels, *labels.absolute().parents[:3]):
        for name in ("data.yaml", "data.yml", "dataset.yaml", *LISTS):
            if (folder / name).is_file():
                return folder / name
    raise InputError(
        f"{labels} holds YOLO's labels, but neither it nor the folders above have a data.yaml with `names:` "
        "(or a classes.txt); add one"
    )


def _names(file: Path) -> tuple[list[str], dict[str, Any]]:
    """Returns the names in order, and the content of `data.yaml`."""
    names = [entry[0] for entry in read_class_list(file)]
    if len(set(names)) < len(names):
        raise InputError(f"{file}: a name stands twice among its {len(names)} names; rename one")
    if file.suffix.lower() not in YAML:
        return names, {}
    content = OmegaConf.to_container(read_yaml(file))
    return names, content if isinstance(content, dict) else {}  # type: ignore[return-value]


def _root(file: Path, content: dict[str, Any]) -> Path:
    """Returns the folder that `data.yaml` calls `path`: relative to the file, which it is by default in."""
    return file.parent / Path(str(content.get("path") or "."))


def _listed(file: Path, root: Path) -> list[Path]:
    """Returns the images that a text file lists, one per line, each once.

    `./` at the beginning is the folder of the file; other names are relative to the dataset, or to the file.
    """
    found = []
    for line in (line.strip() for line in read_text(file, "list of images").splitlines()):
        if line:
            bases = [file.parent] if line.startswith("./") else [root, file.parent]
            places = [base / line for base in bases]
            found.append(next((place for place in places if is_file(place)), places[0]))
    if not found:
        raise InputError(f"list of images {file} is empty")
    return list(dict.fromkeys(place.absolute() for place in found))


def _folder_of(images: list[Path], file: Path) -> Path:
    """Returns the folder that the names of listed images are relative to: `images`, or the one of all."""
    folders = set()
    for parent in {image.parent for image in images}:
        parts = parent.parts
        last = max((place for place, part in enumerate(parts) if part == "images"), default=len(parts) - 1)
        folders.add(Path(*parts[: last + 1]))
    if len(folders) > 1:
        raise InputError(
            f"{file} lists images of several folders, such as {min(folders)} and {max(folders)}; their names "
            "must be relative to one that is called images: give the folder of labels"
        )
    return folders.pop()


def _split_place(file: Path, content: dict[str, Any], split: str) -> Path:
    """Returns the folder of images that `data.yaml` names for a split, or the text file that lists them."""
    named = {key: content[key] for key in SPLITS if content.get(key)}
    places = {str(value) for value in named.values()}
    if not split and len(places) == 1:
        split = next(iter(named))
    if split not in named:
        known = " or ".join(f"{file}#{key}" for key in named) or "none: it names no train, val or test"
        raise InputError(f"which split of {file}? Give {known}")
    value = named[split]
    if not isinstance(value, str):
        raise InputError(
            f"{file}: {split} is {quote(value)}; a folder or a list of images (.txt) is read; give the "
            "folder of labels"
        )
    root = _root(file, content)
    bases = [root] if Path(str(content.get("path") or ".")).is_absolute() else [root, file.parent]
    if Path(value).suffix == LIST:
        lists = [base / value for base in bases]
        return next((one for one in lists if is_file(one)), lists[0])
    # Roboflow writes ../train/images for a folder beside the file.
    values = [value, value.removeprefix("../")]
    for folder in (base / one for base in bases for one in values):
        if is_folder(folder):
            return folder
    return existing(bases[0] / value, f"folder of images ({split} of {file})")


def _labels_of(images: Path) -> Path:
    """Returns the folder of labels that belongs to a folder of images: YOLO's rule, or the same folder."""
    parts = list(images.parts)
    for place in reversed(range(len(parts))):
        if parts[place] == "images":
            found = Path(*parts[:place], "labels", *parts[place + 1 :])
            return existing(found, "folder of YOLO's labels")
    return images


def _images_of(labels: Path) -> Path:
    parts = list(labels.absolute().parts)
    for place in reversed(range(len(parts))):
        if parts[place] == "labels":
            return existing(Path(*parts[:place], "images", *parts[place + 1 :]), "folder of YOLO's images")
    return labels


def _boxes(file: Path, names: list[str], keypoints: bool) -> list[tuple[str, tuple[float, ...]]]:
    """Returns the name and the box (x1, y1, x2, y2), in shares, of each line."""
    found = []
    for number, line in enumerate(read_text(file, "file of labels").splitlines(), 1):
        fields = line.split()
        if not fields:
            continue
        place = f"{file}, line {number}"
        values = [number_of(field, place, "each field") for field in fields]
        if not values[0].is_integer() or not 0 <= values[0] < len(names):
            raise InputError(f"{place}: class {fields[0]} is none of the {len(names)} names, from 0 on")
        box = _corners(values[1:], keypoints, place)
        if min(box) < -SLACK or max(box) > 1 + SLACK:
            raise InputError(
                f"{place}: a box from ({box[0]:g}, {box[1]:g}) to ({box[2]:g}, {box[3]:g}) leaves the image; "
                "numbers must be shares in [0, 1]"
            )
        found.append((names[int(values[0])], tuple(min(max(side, 0.0), 1.0) for side in box)))
    return found


def _corners(values: list[float], keypoints: bool, place: str) -> tuple[float, ...]:
    if len(values) == 4 or (keypoints and len(values) > 4):
        x, y, width, height = values[:4]
        return x - width / 2, y - height / 2, x + width / 2, y + height / 2
    if len(values) == 5:
        raise InputError(f"{place}: six numbers; labels with a confidence are results, not annotations")
    if len(values) < 6 or len(values) % 2:
        raise InputError(f"{place}: {len(values) + 1} numbers; a box has 5, a polygon of n points 2n + 1")
    return around(list(zip(values[::2], values[1::2], strict=True)))
