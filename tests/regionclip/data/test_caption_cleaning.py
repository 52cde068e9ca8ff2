"""Captions are cleaned before the phrase parser sees them, in every reader; the tokenizer cleans as it did.

Covered: captions of `regionclip concepts` in all their kinds of file, and the captions that `mine` parses.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clip_base.models.tokenizer import Tokenizer, clean
from regionclip.concepts.phrases import PhraseParser
from regionclip.data.caption_index import CaptionIndex, write_caption_index
from regionclip.data.captions import cleaned, read_texts

CASES = {
    "salt &amp;amp; pepper": "salt & pepper",
    "a &quot;stop&quot; sign": 'a "stop" sign',
    "a dog&nbsp;house": "a dog house",
    "a red bus<br/>on the street.<br />A man": "a red bus on the street. A man",
    "a <b>red</b> bus": "a red bus",
    "a red\u200b umbrella": "a red umbrella",
    "a soft\u00adware box": "a software box",
    "a \u200e\u200fdog \u200d\u200chere": "a dog here",
    "a dog\U0001f436 on a couch": "a dog on a couch",
    "two men \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f44b\U0001f3fd 5\ufe0f\u20e3": "two men 5",
    "a caf\u00c3\u00a9 table": "a caf\u00e9 table",
    "a\u2028dog\u2029house": "a dog house",
    "a\ud83d dog": "a dog",
    # Left as they are:
    "a cat < a dog > a cow": "a cat < a dog > a cow",
    "I <3 my dog :)": "I <3 my dog :)",
    "\u0646\u06cc\u0645\u200c\u0641\u0627": "\u0646\u06cc\u0645\u200c\u0641\u0627",
}


@pytest.mark.parametrize("raw", CASES, ids=ascii)
def test_a_caption_keeps_only_what_can_name_something(raw: str) -> None:
    assert cleaned(raw) == CASES[raw]
    assert cleaned(cleaned(raw)) == CASES[raw]


def test_every_reader_of_captions_cleans(tmp_path: Path) -> None:
    raw, clean_ones = [text for text in CASES if "\u2028" not in text], []
    for text in raw:
        clean_ones.append(CASES[text])
    files = {
        "a.json": json.dumps(
            {
                "images": [{"id": 1, "file_name": "a.jpg"}],
                "annotations": [{"image_id": 1, "caption": text} for text in raw],
            }
        ),
        "a.jsonl": "\n".join(json.dumps({"caption": text}) for text in raw),
        "a.txt": "\n".join(text.replace("\ud83d", "\ufffd") for text in raw),
        "a.tsv": "caption\tn\n" + "\n".join(text.replace("\ud83d", "\ufffd") + "\t1" for text in raw),
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
        assert list(read_texts(tmp_path / name)) == clean_ones, name
    write_caption_index(tmp_path / "a.json", tmp_path / "a.db")
    images = CaptionIndex(tmp_path / "a.db")
    (image,) = (image for part in images.slices(9) for image in images.read(part))
    assert [text for text in map(cleaned, image.captions) if text] == clean_ones


def test_markup_makes_no_concepts() -> None:
    parser = PhraseParser()
    captions = [cleaned(text) for text in ("salt &amp;amp; pepper shakers", "a red bus<br/>on a street")]
    found = [[phrase.text for phrase in phrases] for phrases in parser.parse(captions)]
    assert found == [["salt & pepper shaker"], ["red bus", "street"]]


@pytest.mark.parametrize("raw", CASES, ids=ascii)
def test_the_tokenizer_reads_a_text_as_it_reads_its_cleaning(raw: str) -> None:
    tokenizer = Tokenizer()
    assert tokenizer.encode(clean(raw)) == tokenizer.encode(raw)
