"""The same boxes in every format of annotations are the same to every job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from clip_base.data.coco import read_instances
from clip_base.images.orientation import EXIF_ORIENTATION
from clip_base.runtime.errors import InputError, InputNote

# file name -> (width, height), {name: boxes (x1, y1, x2, y2)}
SCENES: dict[str, tuple[tuple[int, int], dict[str, list[tuple[float, float, float, float]]]]] = {
    "a.jpg": ((80, 60), {"cat": [(8, 6, 40, 30)], "dog": [(40, 30, 80, 60)]}),
    "sub/b.jpg": ((50, 100), {"dog": [(5, 10, 25, 50), (0, 0, 50, 100)]}),
    "empty.jpg": ((64, 64), {}),
}
NAMES = ["cat", "dog"]


def make_images(folder: Path) -> None:
    for name, (size, _) in SCENES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(folder / name)


def voc(root: Path, first: int = 1) -> Path:
    for name, ((width, height), boxes) in SCENES.items():
        objects = "".join(
            f"<object><name>{category}</name><bndbox><xmin>{x1 + first:g}</xmin><ymin>{y1 + first:g}</ymin>"
            f"<xmax>{x2:g}</xmax><ymax>{y2:g}</ymax></bndbox></object>"
            for category, found in boxes.items()
            for x1, y1, x2, y2 in found
        )
        file = root / "Annotations" / Path(name).with_suffix(".xml")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(
            f"<annotation><filename>{Path(name).name}</filename><size><width>{width}</width>"
            f"<height>{height}</height><depth>3</depth></size>{objects}</annotation>"
        )
    return root / "Annotations"


def yolo_labels(root: Path) -> Path:
    make_images(root / "images" / "val")
    for name, ((width, height), boxes) in SCENES.items():
        lines = [
            f"{NAMES.index(category)} {(x1 + x2) / 2 / width} {(y1 + y2) / 2 / height} "
            f"{(x2 - x1) / width} {(y2 - y1) / height}"
            for category, found in boxes.items()
            for x1, y1, x2, y2 in found
        ]
        file = root / "labels" / "val" / Path(name).with_suffix(".txt")
        if lines:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("\n".join(lines) + "\n")
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnc: 2\nnames: [cat, dog]\n")
    return root / "labels" / "val"


def yolo_split(root: Path) -> Path:
    yolo_labels(root)
    return root / "data.yaml#val"


def cvat(root: Path) -> Path:
    images = "".join(
        f'<image id="{number}" name="{name}" width="{size[0]}" height="{size[1]}">'
        + "".join(
            f'<box label="{category}" xtl="{x1}" ytl="{y1}" xbr="{x2}" ybr="{y2}" occluded="0"/>'
            for category, found in boxes.items()
            for x1, y1, x2, y2 in found
        )
        + "</image>"
        for number, (name, (size, boxes)) in enumerate(SCENES.items())
    )
    labels = "".join(f"<label><name>{name}</name></label>" for name in NAMES)
    file = root / "annotations.xml"
    file.write_text(
        f"<annotations><version>1.1</version><meta><task><labels>{labels}</labels></task></meta>"
        f"{images}</annotations>"
    )
    return file


def rectangles(size: tuple[int, int], boxes: dict[str, list[Any]]) -> list[dict[str, Any]]:
    width, height = size
    return [
        {
            "original_width": width,
            "original_height": height,
            "value": {
                "x": 100 * x1 / width,
                "y": 100 * y1 / height,
                "width": 100 * (x2 - x1) / width,
                "height": 100 * (y2 - y1) / height,
                "rotation": 0,
                "rectanglelabels": [category],
            },
        }
        for category, found in boxes.items()
        for x1, y1, x2, y2 in found
    ]


def label_studio(root: Path) -> Path:
    tasks = [
        {
            "id": number,
            "data": {"image": f"/data/local-files/?d={name}"},
            "annotations": [{"result": rectangles(size, boxes), "was_cancelled": False}],
        }
        for number, (name, (size, boxes)) in enumerate(SCENES.items())
    ]
    file = root / "project.json"
    file.write_text(json.dumps(tasks))
    return file


def label_studio_min(root: Path) -> Path:
    tasks = [
        {
            "image": f"/data/local-files/?d={name}",
            "label": [
                {**one["value"], **{key: one[key] for key in ("original_width", "original_height")}}
                for one in rectangles(size, boxes)
            ],
        }
        for name, (size, boxes) in SCENES.items()
    ]
    file = root / "min.json"
    file.write_text(json.dumps(tasks))
    return file


def content_of(path: Path) -> dict[str, Any]:
    """Returns file name -> (size, {name: boxes}) as `SCENES` has it, and checks what all formats share."""
    content = read_instances(path)
    assert [entry["name"] for entry in content["categories"]] == NAMES
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    found: dict[int, dict[str, list[Any]]] = {entry["id"]: {} for entry in content["images"]}
    for entry in content["annotations"]:
        x, y, width, height = entry["bbox"]
        box = tuple(round(side, 6) for side in (x, y, x + width, y + height))
        found[entry["image_id"]].setdefault(names[entry["category_id"]], []).append(box)
    return {
        entry["file_name"]: ((entry["width"], entry["height"]), found[entry["id"]])
        for entry in content["images"]
    }


@pytest.mark.parametrize("write", [voc, yolo_labels, yolo_split, cvat], ids=lambda write: write.__name__)
def test_every_format_says_the_same(write: Any, tmp_path: Path) -> None:
    assert content_of(write(tmp_path)) == SCENES


@pytest.mark.parametrize("write", [label_studio, label_studio_min], ids=lambda write: write.__name__)
def test_label_studio_says_the_same_but_of_images_without_a_box(write: Any, tmp_path: Path) -> None:
    with pytest.warns(InputNote, match="1 of 3 tasks hold no labeled rectangle"):
        found = content_of(write(tmp_path))
    assert found == {name: scene for name, scene in SCENES.items() if scene[1]}


def test_voc_counted_from_0_is_noticed(tmp_path: Path) -> None:
    with pytest.warns(InputNote, match="count from 0"):
        assert content_of(voc(tmp_path, first=0)) == SCENES


def test_difficult_objects_are_ignored_as_crowds_are(tmp_path: Path) -> None:
    folder = voc(tmp_path)
    file = folder / "a.xml"
    file.write_text(file.read_text().replace("<name>cat</name>", "<name>cat</name><difficult>1</difficult>"))
    crowds = [entry["iscrowd"] for entry in read_instances(folder)["annotations"]]
    assert crowds == [1, 0, 0, 0]


def test_yolo_sees_images_upright(tmp_path: Path) -> None:
    labels = yolo_labels(tmp_path)
    image = Image.new("RGB", (100, 50))  # stored on its side
    exif = image.getexif()
    exif[EXIF_ORIENTATION] = 6
    image.save(tmp_path / "images/val/sub/b.jpg", exif=exif)
    assert content_of(labels) == SCENES


def test_yolo_polygons_become_the_boxes_around_them(tmp_path: Path) -> None:
    labels = yolo_labels(tmp_path)
    (labels / "a.txt").write_text("0 0.1 0.1 0.5 0.3 0.3 0.5\n")
    assert content_of(labels)["a.jpg"][1] == {"cat": [(8, 6, 40, 30)]}


def test_yolo_keypoints_leave_the_box(tmp_path: Path) -> None:
    labels = yolo_labels(tmp_path)
    with (tmp_path / "data.yaml").open("a") as file:
        file.write("kpt_shape: [1, 2]\n")
    (labels / "a.txt").write_text("0 0.3 0.3 0.4 0.4 0.9 0.9\n")
    assert content_of(labels)["a.jpg"][1] == {"cat": [(8, 6, 40, 30)]}


def test_a_rotated_box_of_cvat_becomes_the_upright_one_around_it(tmp_path: Path) -> None:
    file = cvat(tmp_path)
    old = 'label="cat" xtl="8" ytl="6" xbr="40" ybr="30"'
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, old + ' rotation="90.0"'))
    assert content_of(file)["a.jpg"][1]["cat"] == [(12, 2, 36, 34)]


def test_a_rotated_box_of_label_studio_turns_about_its_corner(tmp_path: Path) -> None:
    file = label_studio(tmp_path)
    tasks = json.loads(file.read_text())[1:2]
    tasks[0]["annotations"][0]["result"][0]["value"]["rotation"] = 90
    file.write_text(json.dumps(tasks))
    content = read_instances(file)
    assert content["annotations"][0]["bbox"] == pytest.approx([-35, 10, 40, 20])


BAD: list[tuple[Any, str, str, str, str]] = [
    (voc, "a.xml", "<width>80</width>", "<width>0</width>", "is said to be 0 pixels wide"),
    (voc, "a.xml", "<xmax>40</xmax>", "<xmax>n/a</xmax>", "<xmax> must be a number, found 'n/a'"),
    (voc, "a.xml", "<filename>a.jpg</filename>", "", "needs a <filename>"),
    (voc, "a.xml", "</annotation>", "", "is not well-formed XML"),
    (voc, "a.xml", "<bndbox>", "<polygon>", "is not well-formed XML"),
    (yolo_labels, "a.txt", "1 0.75", "2 0.75", "line 2: class 2 is none of the 2 names"),
    (yolo_labels, "a.txt", "0.75 0.75", "60 45", "numbers must be shares"),
    (yolo_labels, "a.txt", " 0.5 0.5", " 0.5 0.5 0.9", "labels with a confidence are results"),
    (yolo_labels, "a.txt", "0.75 0.75", "0.75 nan", "must be a number, found 'nan'"),
    (yolo_labels, "../../data.yaml", "[cat, dog]", "[cat, cat]", "stands twice"),
    (cvat, "", 'xbr="40"', 'xbr="4"', "the left upper corner first"),
    (cvat, "", 'label="cat"', 'label="horse"', "'horse' is not among its categories"),
    (cvat, "", "<image id", "<track/><image id", "CVAT for video"),
    (cvat, "", 'name="a.jpg"', 'name="empty.jpg"', "describes image 'empty.jpg' twice"),
    (label_studio, "", '"original_width": 80', '"original_width": null', "original_width must be a number"),
]


@pytest.mark.parametrize(("write", "name", "old", "new", "message"), BAD)
def test_bad_annotations_are_one_line(
    write: Any, name: str, old: str, new: str, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path)
    file = path / name if name else path
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(InputError, match=message):
        read_instances(path)


def test_several_annotators_are_refused(tmp_path: Path) -> None:
    file = label_studio(tmp_path)
    tasks = json.loads(file.read_text())
    tasks[0]["annotations"] *= 2
    file.write_text(json.dumps(tasks))
    with pytest.raises(InputError, match="labeled by 2 annotators"):
        read_instances(file)


def test_a_data_yaml_with_two_splits_asks_which(tmp_path: Path) -> None:
    yolo_labels(tmp_path)
    with pytest.raises(InputError, match=r"which split .* Give .*data.yaml#train or .*data.yaml#val"):
        read_instances(tmp_path / "data.yaml")


@pytest.mark.parametrize("line", ["./images/val/{}", "images/val/{}", "{root}/images/val/{}"])
def test_a_data_yaml_may_name_a_list_of_images(line: str, tmp_path: Path) -> None:
    yolo_labels(tmp_path)
    names = sorted(SCENES)[:2]
    lines = [line.format(name, root=tmp_path) for name in names]
    (tmp_path / "some.txt").write_text("\n".join(lines) + "\n\n")
    (tmp_path / "data.yaml").write_text("train: some.txt\nval: some.txt\nnames: [cat, dog]\n")
    assert content_of(tmp_path / "data.yaml") == {f"val/{name}": SCENES[name] for name in names}
    (tmp_path / "some.txt").write_text("\n")
    with pytest.raises(InputError, match=r"list of images .* is empty"):
        read_instances(tmp_path / "data.yaml")
    (tmp_path / "some.txt").unlink()
    with pytest.raises(InputError, match=r"list of images .* does not exist"):
        read_instances(tmp_path / "data.yaml")


def test_a_list_of_images_of_several_folders_is_refused(tmp_path: Path) -> None:
    yolo_labels(tmp_path)
    (tmp_path / "some.txt").write_text("a/1.jpg\nb/2.jpg\n")
    (tmp_path / "data.yaml").write_text("train: some.txt\nnames: [cat, dog]\n")
    with pytest.raises(InputError, match=r"lists images of several folders, such as .*a and .*b;"):
        read_instances(tmp_path / "data.yaml")


def test_labels_without_names_are_refused(tmp_path: Path) -> None:
    labels = yolo_labels(tmp_path / "a" / "b" / "c" / "d")
    (tmp_path / "a" / "b" / "c" / "d" / "data.yaml").unlink()
    with pytest.raises(InputError, match=r"data\.yaml with `names:`"):
        read_instances(labels)


def test_results_are_no_annotations_of_label_studio(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps([{"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1}]))
    with pytest.raises(InputError, match="the form of a results file"):
        read_instances(file)


def test_what_is_of_no_format_names_those_that_are_known(tmp_path: Path) -> None:
    file = tmp_path / "boxes.xml"
    file.write_text("<boxes/>")
    with pytest.raises(InputError, match=r"no known format; known are COCO's JSON and .*voc"):
        read_instances(file)


def test_supervision_reads_the_same_boxes(tmp_path: Path) -> None:
    supervision = pytest.importorskip("supervision")
    labels = yolo_labels(tmp_path)
    (labels / "empty.txt").write_text("")
    found = supervision.DetectionDataset.from_yolo(
        str(tmp_path / "images/val"), str(labels), str(tmp_path / "data.yaml")
    )
    boxes = {Path(path).name: item.xyxy.tolist() for path, _, item in found}
    ours = {entry["file_name"]: [] for entry in read_instances(labels)["images"]}
    content = read_instances(labels)
    names = {entry["id"]: entry["file_name"] for entry in content["images"]}
    for entry in content["annotations"]:
        x, y, width, height = entry["bbox"]
        ours[names[entry["image_id"]]].append([x, y, x + width, y + height])
    assert boxes.keys() <= {Path(name).name for name in ours}
    for name, theirs in boxes.items():
        assert theirs == [pytest.approx(box, abs=1e-3) for box in ours[name]]
