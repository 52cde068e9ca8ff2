"""Noun phrases become concepts."""

from __future__ import annotations

from pathlib import Path

import pytest

from clip_base.runtime.errors import InputError
from regionclip.concepts import phrases as module
from regionclip.concepts import spacy_models as languages
from regionclip.concepts.phrase_cache import PhraseStore, StoredPhrases
from regionclip.concepts.phrases import Phrase, PhraseParser, hidden_by, parse_batch, read_stop_words
from regionclip.concepts.spacy_models import load_language, model_name


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

    def spy(nlp, captions, compounds, batch_size):
        parsed.extend(dict.fromkeys(captions))
        return parse_batch(nlp, captions, compounds, batch_size)

    monkeypatch.setattr(module, "parse_batch", spy)
    monkeypatch.setattr(module, "_TASK", 2)
    captions = ["a cat", "a dog", "a cat", "a horse", "a dog", "a cat"]
    found = list(PhraseParser().parse(captions))
    assert [phrase.text for (phrase,) in found] == ["cat", "dog", "cat", "horse", "dog", "cat"]
    assert parsed == ["a cat", "a dog", "a horse"]


def test_a_full_cache_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_TASK", 2)
    monkeypatch.setattr(module, "_REMEMBERED", 1)
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
    file = tmp_path / "stop_words.txt"
    file.write_text("# mine\nfluffy cat\ndog  # heads too\n")
    parser = PhraseParser(stop_words=str(file))
    assert texts(parser, "a fluffy cat, a black cat and a big dog in front") == ["black cat", "front"]


def test_the_list_that_comes_with_us_holds_no_class_of_coco():
    from regionclip.data.categories import parse_names

    assert not read_stop_words() & set(parse_names("coco"))
    assert {"front", "photo", "picture", "lot", "day", "background", "middle", "side"} <= read_stop_words()


def test_leaving_out_entity_recognition_changes_no_phrase():
    import spacy

    slim = load_language()
    full = spacy.load(next(name for name in languages.ENGLISH if spacy.util.is_package(name)))
    captions = [
        "Two men in New York hold skis.",
        "A Boeing 747 over Big Ben at 5 o'clock",
        "Umbrellas for sale",
    ]
    assert "ner" not in slim.pipe_names
    assert parse_batch(slim, captions, {}, 8) == parse_batch(full, captions, {}, 8)
    assert model_name() == f"en_{slim.meta['name']} {slim.meta['version']}"


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


def test_a_missing_list_of_stop_words_is_an_input_error(tmp_path: Path):
    with pytest.raises(InputError, match="does not exist"):
        read_stop_words(str(tmp_path / "none.txt"))


@pytest.mark.parametrize(
    ("text", "head", "why"),
    [
        ("very front", "front", "front"),
        ("blotchy background", "blotchy background", "background"),
        ("big parking lot", "parking lot", None),
        ("dirt parking lot", "dirt parking lot", None),
        ("dirt lot", "dirt lot", "lot"),
        ("black and white", "white", "black and white"),
        ("dog", "dog", None),
    ],
)
def test_the_last_word_of_a_head_hides_it_unless_the_compound_is_kept(text: str, head: str, why: str | None):
    invisible = frozenset({"front", "background", "lot", "+parking lot", "black and white"})
    assert hidden_by(Phrase(text, head, 0, 1), invisible) == why


def test_the_list_that_comes_with_us_keeps_only_what_it_would_drop():
    listed = read_stop_words()
    kept = [entry[1:] for entry in listed if entry.startswith("+")]
    assert "parking lot" in kept
    assert all(name.rpartition(" ")[2] in listed for name in kept)


def test_what_was_parsed_is_not_parsed_again_whatever_is_invisible_then(tmp_path: Path):
    first = PhraseParser(names=["yellow dog star"])
    first.memory = store = PhraseStore(tmp_path / "a.db", first.fingerprint)
    captions = ["a cat in front", "ein Käse", "a yellow dog star", "a cat in front"]
    found = list(first.parse(captions))
    assert len(store) == 3
    store.close()
    second = PhraseParser(names=["yellow dog star"], stop_words=frozenset({"cat"}))
    second.memory = StoredPhrases(tmp_path / "a.db", second.fingerprint)
    again = list(second.parse(captions))
    assert "nlp" not in vars(second)  # no model was loaded
    assert [phrase.text for phrase in again[0]] == ["front"]
    assert [phrase.text for phrase in found[0]] == ["cat"]
    assert again[1:3] == found[1:3]
    assert [phrase.text for phrase in next(second.parse(["a new dog"]))] == ["new dog"]


def test_phrases_of_another_parser_are_not_taken(tmp_path: Path):
    parser, other = PhraseParser(), PhraseParser(names=["dog star"])
    store = PhraseStore(tmp_path / "a.db", parser.fingerprint, "one file")
    store.add({"a cat": [Phrase("cat", "cat", 2, 5)]})
    store.close()
    with pytest.raises(InputError, match="with another spaCy model, list of names or version"):
        StoredPhrases(tmp_path / "a.db", other.fingerprint)
    assert len(PhraseStore(tmp_path / "a.db", parser.fingerprint, "one file")) == 1
    assert len(PhraseStore(tmp_path / "a.db", parser.fingerprint, "another file")) == 0
    (tmp_path / "a.db").write_bytes(b"no database" * 100)
    with pytest.raises(InputError, match="holds no phrases"):
        StoredPhrases(tmp_path / "a.db", parser.fingerprint)
    assert len(PhraseStore(tmp_path / "a.db", parser.fingerprint)) == 0
    with pytest.raises(InputError, match="does not exist"):
        StoredPhrases(tmp_path / "none.db", parser.fingerprint)


def test_the_longest_name_that_fits_stays_whole_whatever_the_order():
    for names in (["hot dog", "hot dog bun"], ["hot dog bun", "hot dog"]):
        (phrase,) = next(PhraseParser(names=names).parse(["two hot dog buns"]))
        assert phrase.text == "hot dog bun"


def test_a_german_pipeline_without_a_parser_is_refused_with_a_remedy(tmp_path: Path):
    import spacy

    spacy.blank("de").to_disk(tmp_path / "de")
    parser = PhraseParser(str(tmp_path / "de"))
    with pytest.raises(InputError, match=r"only has a tokenizer; choose one with a parser.* de_core_news_sm"):
        list(parser.parse(["ein Hund"]))


def test_a_pipeline_of_another_language_finds_its_phrases(tmp_path: Path):
    """A Dutch pipeline of rules alone, since no other trained one is installed."""
    import spacy
    from spacy.language import Language
    from spacy.tokens import Doc

    @Language.component("test_rules")
    def rules(doc: Doc) -> Doc:
        words = {"een": "DET", "rode": "ADJ", "honden": "NOUN"}
        for token in doc:
            token.pos_ = words.get(token.lower_, "PUNCT")
            token.lemma_ = {"honden": "hond"}.get(token.lower_, token.lower_)
            token.head, token.dep_ = (
                doc[-2],
                {"een": "det", "rode": "amod", "honden": "ROOT"}.get(token.lower_, "punct"),
            )
        return doc

    nlp = spacy.blank("nl")
    nlp.add_pipe("test_rules", name="parser")
    nlp.to_disk(tmp_path / "nl")
    found = next(PhraseParser(str(tmp_path / "nl")).parse(["een rode honden"]))
    assert [(phrase.text, phrase.head) for phrase in found] == [("rode hond", "hond")]
