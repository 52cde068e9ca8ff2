"""Lists of classes in every kind of file give the same names in the same order, or are refused.

Covered: `vocabulary=`, `classes=`, `split=A,B`, `results_categories=`: all use `read_classes`;
`names=` of zero-shot classification.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clip_base.evaluation.zeroshot import class_names
from clip_base.runtime.errors import InputError
from regionclip.data.categories import check_names, load_split, parse_names, read_classes

NAMES = ["person", "traffic light", "dog"]
CATEGORIES = [{"id": 9, "name": "dog"}, {"id": 1, "name": "person"}, {"id": 3, "name": "traffic_light"}]
FILES = {
    "data.yaml": "path: ../data\ntrain: images\nnc: 3\nnames: [person, traffic light, dog]\n",
    "numbered.yaml": "names:\n  0: person\n  2: dog\n  1: traffic light\n",
    "bare.yml": "- person\n- traffic light\n- dog\n",
    "keys.yaml": "2: dog\n0: person\n1: traffic light\n",
    "a.csv": "id,name,color\n9,dog,red\n1,person,blue\n3,traffic light,green\n",
    "b.csv": "class\nperson\ntraffic light\ndog\n",
    "c.tsv": "index\tDisplay Name\n0\tperson\n1\ttraffic light\n2\tdog\n",
    "a.jsonl": "\n".join(json.dumps(name) for name in NAMES),
    "b.jsonl": "\n".join(json.dumps({"name": name, "synonyms": []}) for name in NAMES),
    "pool.jsonl": "\n".join(json.dumps({"concept": name, "count": 3}) for name in NAMES),
    "NAMES.JSON": json.dumps(NAMES),
    "a.json": json.dumps({"categories": CATEGORIES, "images": []}),
    "b.json": json.dumps(CATEGORIES),
    "c.json": json.dumps({"names": {"0": "person", "2": "dog", "1": "traffic light"}}),
    "a.txt": "# COCO's\nperson\n\ntraffic  light\ndog # and its kin\n",
    "coco.names": "person\ntraffic light\ndog\n",
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_names(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_text(FILES[name])
    found = parse_names(str(file))
    assert [" ".join(one.split()) for one in found] == NAMES
    if name != "a.txt":  # where a line is a name, whatever stands in it
        assert class_names([str(file)], ["a", "b", "c"]) == NAMES


def test_two_lists_of_any_kind_make_a_split(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("names: [person, dog]")
    (tmp_path / "novel.csv").write_text("name\ntraffic light\n")
    split = load_split(f"{tmp_path}/base.yaml,{tmp_path}/novel.csv", NAMES)
    assert (split.base, split.novel) == (("person", "dog"), ("traffic light",))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "person\ndog\n", r"no column 'name' in its first line, which is \['person'\]"),
        ("a.csv", "name,color\ndog\n", "line 2 has 1 fields, the first line has 2"),
        ("a.yaml", "train: images\nval: images\n", "must be a list of names, or hold one under 'names'"),
        (
            "a.yaml",
            "names: [yes, no]\n",
            "True is neither a name nor a category with a name; write names in quotes",
        ),
        ("a.yaml", "nc: 3\nnames: [a, b]\n", "says nc: 3 but has 2 names"),
        ("a.yaml", "names: [a, b", "not valid YAML"),
        ("a.yaml", "names: a\nnames: b\n", "not valid YAML"),
        ("a.yaml", "", "holds no names"),
        ("a.json", '{"images": []}', "must be a list of names, or hold one"),
        ("a.json", '["a", 3]', "entry 1: 3 is neither a name"),
        ("a.json", '["a", " "]', "entry 1: ' ' is neither a name"),
        ("a.jsonl", '{"title": "a"}', r"entry 0: \{'title': 'a'\} is neither a name"),
        ("a.json", "[]", "holds no names"),
        ("a.txt", "# nothing\n", "holds no names"),
        ("a.txt", "names:\n- a\n", "looks like JSON, YAML or XML"),
        ("a.txt", "0: person\n1: dog\n", "looks like JSON, YAML or XML"),
        ("a.txt", '["person", "dog"]', "looks like JSON, YAML or XML"),
        ("a.xml", "<a/>", "of an unknown kind"),
        ("a.npy", "x", "of an unknown kind"),
    ],
)
def test_what_is_no_list_of_classes_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(InputError, match=rf"class list {file}.*{message}"):
        parse_names(str(file))


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["cup", "Cup"], "'cup' = 'Cup' occurs more than once"),
        (["cup", "a  dog", "A dog"], "'a  dog' = 'A dog' occurs"),
        (["cup", "cup"], "'cup' occurs more than once"),
    ],
)
def test_names_that_the_tokenizer_cannot_tell_apart_are_one_name_twice(names: list[str], shown: str) -> None:
    with pytest.raises(InputError, match=shown):
        check_names(names)


def test_a_typed_list_is_no_file_unless_it_names_one(tmp_path: Path) -> None:
    assert read_classes("cat, dog") == [("cat",), ("dog",)]
    comma = tmp_path / "a,b.txt"
    comma.write_text("cat\n")
    assert parse_names(str(comma)) == ["cat"]
    long = ", ".join(f"a thing of kind {number}" for number in range(500))
    assert len(parse_names(long)) == 500
    with pytest.raises(InputError, match="File name too long"):
        parse_names("/" + "x" * 5000)


def test_the_lists_that_come_with_the_project_pass() -> None:
    assert [len(parse_names(name)) for name in ("coco", "coco65", "lvis")] == [80, 65, 1203]
