"""CVAT for images: one XML file with all images and their shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from clip_base.data.formats.instances import Instances, number_of, rotated
from clip_base.data.formats.xml_files import attribute_of, read_xml, root_tag
from clip_base.runtime.errors import InputError, note

SHAPES = ("polygon", "polyline", "points", "cuboid", "ellipse", "mask", "skeleton", "tag")


def read_cvat(path: Path) -> dict[str, Any] | None:
    """Returns a file of CVAT's format "CVAT for images" in COCO's format; None when it is no such file.

    A rotated box becomes the upright one around it. Other shapes than boxes are left out, which a note says.

    Raises:
        InputError: the file is malformed, or of CVAT's format for videos.
    """
    if path.is_dir() or path.suffix.lower() != ".xml" or root_tag(path) != "annotations":
        return None
    root, where = read_xml(path), f"annotations file {path}"
    if root.find("track") is not None:
        raise InputError(f'{where} is of the format "CVAT for video"; export it as "CVAT for images"')
    instances = Instances(where, [label.findtext("name") or "" for label in root.iterfind("meta//label")])
    other = 0
    for image in root.iterfind("image"):
        name = attribute_of(image, "name", f"{where}: an <image>")
        place = f"{where}: image {name}"
        height, width = (
            int(number_of(attribute_of(image, key, place), place, key)) for key in ("height", "width")
        )
        image_id = instances.add_image(name, (height, width))
        for box in image.iterfind("box"):
            instances.add_box(image_id, attribute_of(box, "label", place), _corners(box, place), place)
        other += sum(len(image.findall(shape)) for shape in SHAPES)
    if other:
        note(f"{path}: {other:,} shapes that are no boxes are left out")
    return instances.to_coco()


def _corners(box: ElementTree.Element, place: str) -> tuple[float, ...]:
    corners = [number_of(attribute_of(box, key, place), place, key) for key in ("xtl", "ytl", "xbr", "ybr")]
    degrees = number_of(box.get("rotation", "0"), place, "rotation")
    if not degrees:
        return tuple(corners)
    x1, y1, x2, y2 = corners
    return rotated(corners, degrees, ((x1 + x2) / 2, (y1 + y2) / 2))  # CVAT's pivot is the box's center
