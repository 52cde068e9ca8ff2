"""Noun phrases become concepts."""

from __future__ import annotations

from pathlib import Path

import pytest

from clip_base.errors import InputError
from regionclip import phrases as module
from regionclip.phrases import PhraseParser, load_language, model_name, parse_batch, read_invisible


@pytest.fixture(scope="module")
def parser() -> PhraseParser:
    return PhraseParser()


def texts(parser: PhraseParser, caption: str) -> list[str]:
    return [phrase.text for phrase in next(parser.parse([caption]))]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("Two red umbrellas next to the chess queen", ["red umbrella", "chess queen"]),
        ("A pair of scissors and two pairs of scissors on a table.", ["scissors", "scissors", "table"]),
        ("A group of people standing in front of a red fire hydrant.", ["person", "red fire hydrant"]),
        ("an anchor next to two red umbrellas", ["anchor", "red umbrella"]),
        ("A parking lot with lots of cars", ["parking lot", "car"]),
        ("a small, brown dog in a t-shirt", ["small brown dog", "t-shirt"]),
        ("Several very large orange umbrellas", ["large orange umbrella"]),
        ("a man's hat and his shoes", ["man's hat", "shoe"]),
        ("A black and white photo of a black and white cat", ["black and white cat"]),
        ("three white 2-story buildings", ["white 2-story building"]),
        ("It is one of them, she is two.", []),
        ("", []),
    ],
)
def test_a_caption_gives_its_concepts(parser: PhraseParser, caption: str, expected: list[str]):
    assert texts(parser, caption) == expected


def test_a_compound_is_its_own_head(parser: PhraseParser):
    found = next(parser.parse(["a man in a red hat beside a yellow fire hydrant"]))
    assert [phrase.head for phrase in found] == ["man", "hat", "fire hydrant"]


def test_a_known_name_of_several_words_is_not_torn_apart():
    caption = "A dog next to yellow fire hydrants"
    found = next(PhraseParser(names=["yellow dog star"]).parse([caption]))
    assert [(phrase.text, phrase.head) for phrase in found] == [
        ("dog", "dog"),
        ("yellow fire hydrant", "fire hydrant"),
    ]
    assert caption[found[1].start : found[1].end] == "yellow fire hydrants"


def test_the_span_is_the_phrase_in_the_caption_without_its_determiner(parser: PhraseParser):
    caption = "Here are two red umbrellas."
    (phrase,) = next(parser.parse([caption]))
    assert caption[phrase.start : phrase.end] == "red umbrellas"


def test_the_order_is_the_captions_order_and_repeats_are_parsed_once(monkeypatch: pytest.MonkeyPatch):
    parsed: list[str] = []

    def spy(nlp, captions, invisible, compounds, batch_size):
        parsed.extend(captions)
        return parse_batch(nlp, captions, invisible, compounds, batch_size)

    monkeypatch.setattr(module, "parse_batch", spy)
    monkeypatch.setattr(module, "_TASK", 2)
    captions = ["a cat", "a dog", "a cat", "a horse", "a dog", "a cat"]
    found = list(PhraseParser().parse(captions))
    assert [phrase.text for (phrase,) in found] == ["cat", "dog", "cat", "horse", "dog", "cat"]
    assert parsed == ["a cat", "a dog", "a horse"]


def test_a_full_cache_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_TASK", 2)
    monkeypatch.setattr(module, "_CACHED", 1)
    captions = ["a cat", "a dog", "a cat", "a horse", "a dog"]
    assert [p.text for (p,) in PhraseParser().parse(captions)] == ["cat", "dog", "cat", "horse", "dog"]


def test_several_processes_find_the_same(parser: PhraseParser, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_TASK", 3)
    captions = [
        f"{number} {thing} near a tree" for number in ("two", "ten") for thing in ("cats", "dogs", "red cars")
    ]
    captions *= 4
    assert list(PhraseParser(workers=2).parse(captions)) == list(parser.parse(captions))


def test_an_edited_list_decides_what_is_invisible(tmp_path: Path):
    file = tmp_path / "invisible.txt"
    file.write_text("# mine\nfluffy cat\ndog  # heads too\n")
    parser = PhraseParser(invisible=str(file))
    assert texts(parser, "a fluffy cat, a black cat and a big dog in front") == ["black cat", "front"]


def test_the_list_that_comes_with_us_holds_no_class_of_coco():
    from regionclip.vocabulary import parse_names

    assert not read_invisible() & set(parse_names("coco"))
    assert {"front", "photo", "picture", "lot", "day", "background", "middle", "side"} <= read_invisible()


def test_leaving_out_entity_recognition_changes_no_phrase():
    import spacy

    slim = load_language()
    full = spacy.load(next(name for name in module.ENGLISH if spacy.util.is_package(name)))
    captions = [
        "Two men in New York hold skis.",
        "A Boeing 747 over Big Ben at 5 o'clock",
        "Umbrellas for sale",
    ]
    assert "ner" not in slim.pipe_names
    assert parse_batch(slim, captions, frozenset(), {}, 8) == parse_batch(full, captions, frozenset(), {}, 8)
    assert model_name(slim).startswith("en_core_web_sm")


def test_a_model_that_is_not_installed_is_named_with_the_remedy():
    with pytest.raises(
        InputError, match=r"xx_none_sm is not installed; install it with .*download xx_none_sm"
    ):
        load_language("xx_none_sm")


def test_without_any_english_model_the_remedy_is_an_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("spacy.util.is_package", lambda name: False)
    with pytest.raises(InputError, match="pip install en-core-web-sm"):
        load_language()


def test_a_model_without_a_parser_is_refused(tmp_path: Path):
    import spacy

    spacy.blank("en").to_disk(tmp_path / "blank")
    with pytest.raises(InputError, match="cannot find noun phrases"):
        load_language(str(tmp_path / "blank"))


def test_a_missing_invisible_list_is_an_input_error(tmp_path: Path):
    with pytest.raises(InputError, match="does not exist"):
        read_invisible(str(tmp_path / "none.txt"))
