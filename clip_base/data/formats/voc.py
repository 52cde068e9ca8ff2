"""Pascal VOC: one XML file per image, in a folder (`annotations=VOC2007/Annotations`), or one alone.

Coordinates of VOC count pixels from 1, and the last pixel belongs to the box (the development kit's
documentation of 2007, section on annotation). Tools that write this format often count from 0; a folder in
which any coordinate is below 1 must be one of these, and is read so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from clip_base.data.formats.instances import Instances, number_of
from clip_base.data.formats.xml_files import read_xml, root_tag, text_of
from clip_base.images.folders import list_files
from clip_base.runtime.errors import InputError, note

Objects = list[tuple[str, list[float], bool]]  # name, corners as written, difficult


def read_voc(path: Path) -> dict[str, Any] | None:
    """Returns a folder of VOC files, or one file, in COCO's format; None when it is no such folder or file.

    An image's name is its `<filename>`, in the folder that the XML file is in below `path`. Objects that
    are `difficult` are ignored, as VOC's evaluation does: they become crowds.

    Raises:
        InputError: a file is malformed.
    """
    if path.is_dir():
        files, folder = list_files(path, (".xml",), what="annotations folder").files, path
    else:
        files, folder = [path] if path.suffix.lower() == ".xml" else [], path.parent
    if not files or root_tag(files[0]) != "annotation":
        return None
    found = [_read(file, folder) for file in files]
    corners = [box for _, _, objects in found for _, box, _ in objects]
    first = 1 if all(min(box) >= 1 for box in corners) else 0
    if corners and not first:
        note(f"{path}: coordinates count from 0, not from 1 as VOC's own, since some are below 1")
    instances = Instances(str(path))
    for name, size, objects in found:
        image = instances.add_image(name, size)
        for category, (x1, y1, x2, y2), difficult in objects:
            box = (x1 - first, y1 - first, x2, y2)
            instances.add_box(image, category, box, f"{path}: image {name}", difficult)
    return instances.to_coco()


def _read(file: Path, folder: Path) -> tuple[str, tuple[int, int], Objects]:
    """Returns an image's name, its (height, width) and its objects."""
    root, place = read_xml(file), f"annotations file {file}"
    if root.tag != "annotation":
        raise InputError(f"{place} is no VOC annotation but <{root.tag}>; take it out of the folder")
    name = Path(text_of(root, "filename", place).replace("\\", "/")).name
    if not Path(name).suffix:
        name += ".jpg"
    sizes = root.find("size")
    if sizes is None:
        raise InputError(f"{place} needs a <size> with the image's <width> and <height>")
    height, width = (int(number_of(sizes.findtext(key), place, f"<{key}>")) for key in ("height", "width"))
    objects = [_object(element, place) for element in root.iter("object")]
    return str(file.relative_to(folder).parent / name), (height, width), objects


def _object(element: ElementTree.Element, place: str) -> tuple[str, list[float], bool]:
    name = text_of(element, "name", place)
    box = element.find("bndbox")
    if box is None:
        raise InputError(f"{place}: object {name!r} has no <bndbox>; only boxes are read")
    corners = [number_of(box.findtext(key), place, f"<{key}>") for key in ("xmin", "ymin", "xmax", "ymax")]
    return name, corners, (element.findtext("difficult") or "0").strip() == "1"
