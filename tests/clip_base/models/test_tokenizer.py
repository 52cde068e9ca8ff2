from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clip_base.models import tokenizer as module
from clip_base.models.tokenizer import END, START, Tokenizer, tokenize
from clip_base.runtime.errors import InputError

# Ids that openai/CLIP's tokenizer gives.
CAT = [320, 1125, 539, 320, 2368]


def test_ids_are_the_published_ones():
    assert Tokenizer().encode("a photo of a cat") == CAT


def test_a_row_is_start_ids_end_and_zeros():
    tokens = tokenize("a photo of a cat")
    assert tokens.dtype == torch.int32  # as openai/CLIP's function gives them
    assert Tokenizer()("a cat").dtype == torch.int64
    assert tokens.tolist() == [[START, *CAT, END] + [0] * 70]


def test_case_and_white_space_do_not_count():
    assert Tokenizer().encode("  A\tPhoto\n of  a CAT ") == CAT


def test_entities_are_unescaped_twice():
    tokenizer = Tokenizer()
    assert tokenizer.encode("black &amp;amp; white") == tokenizer.encode("black & white")


def test_control_characters_and_terminal_colors_are_removed():
    tokenizer = Tokenizer()
    assert tokenizer.encode("a ph\x00ot\x0bo of \x1b[31ma cat\x7f") == CAT


def test_curly_quotes_are_straightened():
    tokenizer = Tokenizer()
    assert tokenizer.encode("the dog\u2019s \u201cbone\u201d") == tokenizer.encode('the dog\'s "bone"')


def test_punctuation_and_numbers_are_split_from_words():
    tokenizer = Tokenizer()
    apart = [i for piece in ("dog", "'s", ",", "4", "2") for i in tokenizer.encode(piece)]
    assert tokenizer.encode("dog's,42") == apart


def test_special_tokens_in_the_text_become_their_ids():
    assert Tokenizer().encode("<|startoftext|>cat<|EndOfText|>") == [START, 2368, END]
    assert tokenize("<|endoftext|>")[0, :4].tolist() == [START, END, END, 0]
    # open_clip's spelling is text like any other, as for openai/CLIP.
    assert END not in Tokenizer().encode("<end_of_text>")


def test_a_text_that_is_too_long_is_named():
    for kind in (InputError, RuntimeError):  # openai/CLIP's is the latter
        with pytest.raises(kind, match=r"text 1 has 100 tokens, 75 fit.*'cat cat.*truncate=True"):
            tokenize(["short", "cat " * 100])


def test_truncation_keeps_the_end_token():
    row = tokenize("cat " * 100, truncate=True)[0].tolist()
    assert row == [START] + [2368] * 75 + [END]


def test_a_short_context_is_filled_exactly():
    tokens = Tokenizer(context_length=7)(["a photo of a cat", ""])
    assert tokens.tolist() == [[START, *CAT, END], [START, END, 0, 0, 0, 0, 0]]


def test_a_context_without_room_for_start_and_end_is_refused():
    with pytest.raises(InputError, match="context_length"):
        Tokenizer(context_length=1)


def test_no_texts_make_no_rows():
    assert tokenize([]).shape == (0, 77)


def test_decoding_restores_words_with_a_space_after_each():
    assert Tokenizer().decode([START, *CAT, END]) == "<|startoftext|>a photo of a cat <|endoftext|>"


def test_decoding_an_unknown_id_is_refused():
    with pytest.raises(InputError, match="token id 49408"):
        Tokenizer().decode([49408])


def test_the_table_of_words_stays_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MAX_WORDS", 10)
    tokenizer, size = Tokenizer(), len(pickle.dumps(Tokenizer()))
    fresh = [Tokenizer().encode(f"word{n}") for n in range(50)]
    assert [tokenizer.encode(f"word{n}") for n in range(50)] == fresh
    assert len(pickle.dumps(tokenizer)) < size + 20 * 30  # about 20 bytes for each that is kept


@given(
    st.text(st.characters(codec="ascii", categories=["Ll", "Nd", "Po"], exclude_characters="&"), min_size=1)
)
def test_decoding_restores_the_characters(text: str):
    tokenizer = Tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)).replace(" ", "") == text


@given(st.text())
def test_remembered_words_do_not_change_ids(text: str):
    tokenizer = Tokenizer()
    tokenizer.encode("it's a <|endoftext|>dog, isn't it?! 'tis 2nd-hand…")
    once = tokenizer.encode(text)
    assert tokenizer.encode(text) == once == Tokenizer().encode(text)
