"""Label writer of Pascal VOC's layout: `Annotations/NAME.xml`, `JPEGImages`, `ImageSets/Main/train.txt`."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from clip_base.storage.files import replacing, write_text
from regionclip.export.images_beside import ImagesBeside, inside
from regionclip.export.label_writers import FolderWriter
from regionclip.structures.labels import LabeledImage


class VocWriter(FolderWriter):
    """One XML file per image; pixels count from 1, ignored boxes are `difficult`."""

    kind = "voc"

    def begin(self) -> None:
        """Finds the images, which VOC has beside the labels."""
        self.names: list[str] = []
        self.images = ImagesBeside(self.folder / "JPEGImages", self.target.images_folder)

    def add(self, image: LabeledImage) -> None:
        """See `LabelWriter`."""
        name = Path(image.file_name)
        root = ElementTree.Element("annotation")
        _texts(root, folder="JPEGImages", filename=name.name)
        _texts(ElementTree.SubElement(root, "size"), width=image.width, height=image.height, depth=3)
        for row, ((x1, y1, x2, y2), label) in enumerate(zip(image.boxes, image.labels, strict=True)):
            found = ElementTree.SubElement(root, "object")
            ignored = int(bool(image.ignored and image.ignored[row]))
            _texts(found, name=self.target.categories[label], difficult=ignored)
            sides = {"xmin": x1 + 1, "ymin": y1 + 1, "xmax": x2, "ymax": y2}
            _texts(
                ElementTree.SubElement(found, "bndbox"), **{key: f"{side:.2f}" for key, side in sides.items()}
            )
            if image.scores is not None:
                _texts(found, score=f"{image.scores[row]:.5f}")
        ElementTree.indent(root)
        file = inside(self.folder / "Annotations", name.with_suffix(".xml"))
        with replacing(file) as temporary:
            ElementTree.ElementTree(root).write(temporary, encoding="utf-8")
        self.images.add(image.file_name)
        self.names.append(f"{name.with_suffix('')}\n")

    def end(self) -> None:
        """Writes the list of images."""
        write_text(self.folder / "ImageSets" / "Main" / "train.txt", "".join(self.names))


def _texts(parent: ElementTree.Element, **texts: object) -> None:
    for key, value in texts.items():
        ElementTree.SubElement(parent, key).text = str(value)
