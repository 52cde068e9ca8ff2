"""Large JSON files, read entry by entry; memory does not grow with the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from clip_base.runtime.errors import InputError
from clip_base.storage.files import json_fault, open_text
from clip_base.storage.kinds import JSON, kind_of

_BLOCK = 1 << 20  # characters read at once
_WHITE = " \t\n\r"
_LONGEST_WORD = (
    12  # characters of what the decoder takes at once besides texts: "-Infinity", "\\ud83d\\ude00"
)


def stream_entries(path: str | Path, what: str = "JSON file") -> Iterator[tuple[str, Any]]:
    """Yields what a JSON file holds, one entry of its lists at a time.

    Args:
        path: a file whose top is an object or a list.
        what: what the file is to the user, for messages.

    Yields:
        (key, value) for an object: a list's entries one by one under its key, other values whole; an empty
        list yields nothing. ("", entry) for a list.

    Raises:
        InputError: a missing, empty or malformed file; the line is named. What stood before it was yielded.
    """
    try:
        with open_text(path, what) as file:
            yield from _Stream(file).entries()
    except _MalformedError as error:
        if error.empty:
            raise InputError(f"{what} {path} is empty; write it again or give another path") from None
        kind = kind_of(path)
        if kind not in ("", JSON):
            raise InputError(f"{what} {path} is {kind}, and a file of JSON is needed") from None
        fault = json_fault(error.reason, f" at line {error.line}")
        raise InputError(f"{what} {path} is not valid JSON: {fault}") from None


class _MalformedError(Exception):
    def __init__(self, reason: ValueError | RecursionError, line: int, empty: bool) -> None:
        self.reason, self.line, self.empty = reason, line, empty


class _Stream:
    """Reads blocks and forgets what was decoded."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.text, self.at = file, "", 0
        self.lines = 1  # the line on which `text` begins
        self.empty = True  # nothing but white space so far
        self.decoder = json.JSONDecoder()

    def entries(self) -> Iterator[tuple[str, Any]]:
        first = self._peek()
        if first == "[":
            yield from (("", entry) for entry in self._list())
        elif first == "{":
            yield from self._object()
        else:
            # The decoder knows better what is wrong; a lone number or text has no entries.
            yield "", self._value()
        if self._peek():
            raise self._malformed("Extra data")

    def _object(self) -> Iterator[tuple[str, Any]]:
        self.at += 1
        if self._peek() == "}":
            self.at += 1
            return
        while True:
            if self._peek() != '"':
                raise self._malformed("Expecting property name enclosed in double quotes")
            key = str(self._value())
            self._expect(":")
            if self._peek() == "[":
                yield from ((key, entry) for entry in self._list())
            else:
                yield key, self._value()
            if self._peek() == "}":
                self.at += 1
                return
            self._expect(",")

    def _list(self) -> Iterator[Any]:
        self.at += 1
        if self._peek() == "]":
            self.at += 1
            return
        while True:
            yield self._value()
            if self._peek() == "]":
                self.at += 1
                return
            self._expect(",")

    def _value(self) -> Any:
        self._peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                # An entry that a block cuts off is decoded once the rest is there.
                cut = error.pos + _LONGEST_WORD > len(self.text) or error.msg.startswith("Unterminated")
                if not (cut and self._more()):
                    self.at = error.pos
                    raise self._malformed(error) from None
                continue
            except (ValueError, RecursionError) as error:
                raise self._malformed(error) from None
            if end == len(self.text) and self._more():
                continue  # a number may continue in the next block
            self.at = end
            return value

    def _expect(self, character: str) -> None:
        if self._peek() != character:
            raise self._malformed(f"Expecting {character!r} delimiter")
        self.at += 1

    def _peek(self) -> str:
        """Returns the next character that is no white space, "" at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in _WHITE:
                self.at += 1
            if self.at < len(self.text):
                self.empty = False
                return self.text[self.at]
            if not self._more():
                return ""

    def _more(self) -> bool:
        """Reads a block behind what is not decoded yet; at least as much again, so that long entries end."""
        block = self.file.read(max(_BLOCK, len(self.text) - self.at))
        self.lines += self.text.count("\n", 0, self.at)
        self.text, self.at = self.text[self.at :] + block, 0
        return bool(block)

    def _malformed(self, reason: str | ValueError | RecursionError) -> _MalformedError:
        reason = json.JSONDecodeError(reason, "", 0) if isinstance(reason, str) else reason
        return _MalformedError(reason, self.lines + self.text.count("\n", 0, self.at), self.empty)
