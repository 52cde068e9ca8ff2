"""Captions files are read entry by entry, and their images in any part."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from clip_base.data.coco import read_captions
from clip_base.runtime.errors import InputError
from clip_base.storage import json_stream
from clip_base.storage.json_stream import stream_entries
from regionclip.data.caption_index import CaptionIndex, ImageRange, write_caption_index

CONTENT = {
    "info": {"a": [1, {"b": 2}]},
    "images": [{"id": n, "file_name": f'ü{n}"].jpg'} for n in range(30)],
    "number": 12345,
    "annotations": [{"image_id": n % 20, "caption": "x" * n} for n in range(50)],
    "empty": [],
    "mixed": [1.5e10, -3, True, None, "\U0001f600", []],
}


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
def test_entries_are_those_of_the_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, indent: int | None
) -> None:
    monkeypatch.setattr(json_stream, "_BLOCK", block)
    file = tmp_path / "a.json"
    file.write_text(json.dumps(CONTENT, indent=indent, ensure_ascii=bool(indent)))
    found: dict[str, list[object]] = {}
    for key, value in stream_entries(file):
        found.setdefault(key, []).append(value)
    assert found == {
        key: value if isinstance(value, list) else [value] for key, value in CONTENT.items() if value
    }
    file.write_text(json.dumps(CONTENT["mixed"]))
    assert [value for _, value in stream_entries(file)] == CONTENT["mixed"]


@pytest.mark.parametrize("block", [1, 1 << 20])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (" \n\n", "is empty"),
        ("{", "is not valid JSON: Expecting property name enclosed in double quotes at line 1"),
        ('{"a"', "Expecting ':' delimiter"),
        ('{"a":\n[1,', "Expecting value at line 2"),
        ('{"a":[1\n2]}', "Expecting ',' delimiter at line 2"),
        ('{"a":1}\nx', "Extra data at line 2"),
        ('{"a": [{"b": "c', "Unterminated string starting at line 1"),
        ("\x00\xff", "it holds NUL bytes; is it the right file"),
        ("tru", "Expecting value"),
    ],
)
def test_a_malformed_file_is_named_with_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str, block: int
) -> None:
    monkeypatch.setattr(json_stream, "_BLOCK", block)
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(
        InputError, match=f"captions file .*a.json {message}" if "empty" in message else message
    ):
        list(stream_entries(file, "captions file"))


def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "_BLOCK", 1 << 14)
    peaks = []
    for count in (2_000, 20_000):
        file = tmp_path / f"{count}.json"
        file.write_text(json.dumps({"annotations": [{"caption": f"caption {n}" * 5} for n in range(count)]}))
        tracemalloc.start()
        assert sum(1 for _ in stream_entries(file)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def listed(folder: Path, content: object) -> CaptionIndex:
    (folder / "captions.json").write_text(json.dumps(content))
    write_caption_index(folder / "captions.json", folder / "list.db")
    return CaptionIndex(folder / "list.db")


def test_the_list_holds_what_the_captions_file_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regionclip.data.caption_index._AT_ONCE", 7)
    content = {
        "annotations": [
            {"image_id": (n * 7) % 23 * 10, "caption": f"  caption\n {n} \ud83d" if n % 5 else " "}
            for n in range(60)
        ],
        "images": [{"id": n * 10, "file_name": f"{n}.jpg"} for n in reversed(range(25))],
    }
    images = listed(tmp_path, content)
    captions, names = read_captions(tmp_path / "captions.json")
    found = [image for part in images.slices(4) for image in images.read(part)]
    assert [image.image_id for image in found] == sorted(names)
    for image in found:
        assert image.file_name == names[image.image_id]
        wanted = [text.replace(" \ud83d", "") for text in captions.get(image.image_id, ())]
        assert list(image.captions) == wanted
    assert len(images) == 25
    assert list(tmp_path.glob(".*")) == []


@pytest.mark.parametrize(("count", "sizes"), [(3, [3]), (4, [4]), (9, [4, 4, 1])])
def test_slices_cover_all_images_in_the_order_of_ids(tmp_path: Path, count: int, sizes: list[int]) -> None:
    content = {"images": [{"id": 5 * n, "file_name": "a"} for n in range(count)]}
    slices = list(listed(tmp_path, content).slices(4))
    assert [part.count for part in slices] == sizes
    assert [part.number for part in slices] == list(range(len(sizes)))
    assert slices[0] == ImageRange(0, 0, 5 * (sizes[0] - 1), sizes[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": 1}, "is not in COCO's format, or lists no image"),
        ({"images": [{"id": 1}]}, r"images\[0\] needs a 'file_name'"),
        (
            {"images": [], "annotations": [{"image_id": 1, "caption": 3}]},
            r"annotations\[0\] needs a 'caption', which must be a text",
        ),
        (
            {"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 9, "caption": "x"}]},
            r"captions for 1 images that it does not list \(image_id 9",
        ),
    ],
)
def test_what_is_no_captions_file_leaves_nothing(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        listed(tmp_path, content)
    assert [path.name for path in tmp_path.iterdir()] == ["captions.json"]


def test_an_id_of_two_pictures_is_refused_and_a_repeated_entry_is_not(tmp_path: Path) -> None:
    file, images = tmp_path / "captions.json", [{"id": 7, "file_name": "a.jpg"}] * 2
    file.write_text(json.dumps({"images": images, "annotations": []}))
    write_caption_index(file, tmp_path / "list.db")
    assert len(CaptionIndex(tmp_path / "list.db")) == 1
    file.write_text(json.dumps({"images": [*images, {"id": 7, "file_name": "b.jpg"}], "annotations": []}))
    with pytest.raises(InputError, match=r"captions\.json: image id 7 is used for both a\.jpg and b\.jpg"):
        write_caption_index(file, tmp_path / "list.db")
