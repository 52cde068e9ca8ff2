"""Texts as tokens, and which of many queries a text contains.

A token is a run of word characters, or one other character that is no white space. A text contains a query
when the query's tokens follow each other in it, letters compared by case folding: `car` is in "The CAR." and
in "car-park", not in "cart"; `new york` is in "New York", not in "new, York".
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from array import array
from collections.abc import Sequence

import regex  # type: ignore[import-untyped]

from clip_base.runtime.errors import InputError

_TOKENS = r"\w+|[^\w\s]"
_ascii_tokens = re.compile(_TOKENS).findall  # twice as fast as regex, whose \w knows the marks of all scripts
_tokens = regex.compile(_TOKENS).findall
INSTALL = "pip install 'regionclip[curate]'"


def token_text(text: str) -> str:
    """Returns a text's tokens, case folded, each between two spaces: " a dog ' s ball "."""
    if text.isascii():
        tokens = _ascii_tokens(text.lower())
    else:
        folded = unicodedata.normalize("NFC", text).casefold().replace("’", "'")
        tokens = _tokens(unicodedata.normalize("NFC", folded))
    return f" {' '.join(tokens)} "


class Matcher:
    """Finds all queries in texts at once, by an Aho-Corasick automaton.

    Args:
        queries: texts; of those with equal tokens the last one is found.

    Raises:
        InputError: pyahocorasick is not installed, or there is no query.
    """

    def __init__(self, queries: Sequence[str]) -> None:
        try:
            import ahocorasick  # noqa: PLC0415 (optional)
        except ImportError:
            raise InputError(f"curate needs pyahocorasick; install it with `{INSTALL}`") from None
        self._automaton = ahocorasick.Automaton(ahocorasick.STORE_INTS)
        for number, query in enumerate(queries):
            # The spaces are the boundaries of words; tokens hold none.
            self._automaton.add_word(token_text(query), number)
        if not len(self._automaton):
            raise InputError("there is no query to look for")
        self._automaton.make_automaton()

    def find(self, text: str) -> array[int]:
        """Returns the numbers of the queries in a text, once per occurrence, in the order of their ends."""
        found = array("q")
        found.extend(itertools.chain.from_iterable(self._automaton.iter(token_text(text))))
        return found[1::2]  # the automaton yields (end, number)
