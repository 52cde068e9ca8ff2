"""A cache of caption phrases on disk, so that each caption is parsed only once."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path

from clip_base.runtime.errors import InputError
from clip_base.storage.files import make_folder, naming_full_disk
from regionclip.concepts.phrases import Found, LRUPhraseCache, Phrase

PHRASES = ".phrases.db"  # what the file of phrases is called behind the pool's name
_AT_ONCE = 500  # captions that one query asks for; SQLite's oldest limit is 999


def phrases_file(pool: str | Path) -> Path:
    """Returns the file beside a pool of concepts that keeps the phrases of its captions."""
    return Path(f"{pool}{PHRASES}")


class PhraseStore:
    """A memory of a `PhraseParser` in an SQLite file: each caption's hash and all its phrases.

    Args:
        path: the file; "" is one of this process alone, which ends with it.
        fingerprint: the parser's; what another one found is thrown away.
        captions: hash of the captions file that is being parsed; phrases of another file are thrown away.
    """

    def __init__(self, path: str | Path, fingerprint: str, captions: str = "") -> None:
        self._where = Path(path or ".")
        make_folder(Path(path).parent)
        try:
            self._open(str(path), [fingerprint, captions])
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError:  # a file of something else
            self._where.unlink()
            self._open(str(path), [fingerprint, captions])

    def _open(self, path: str, identity: list[str]) -> None:
        self._base = sqlite3.connect(path)
        with self._base as base:
            base.execute("CREATE TABLE IF NOT EXISTS identity (parser TEXT, captions TEXT)")
            base.execute(
                "CREATE TABLE IF NOT EXISTS phrases (caption BLOB PRIMARY KEY, found TEXT) WITHOUT ROWID"
            )
            if base.execute("SELECT parser, captions FROM identity").fetchall() != [tuple(identity)]:
                base.execute("DELETE FROM identity")
                base.execute("DELETE FROM phrases")
                base.execute("INSERT INTO identity VALUES (?, ?)", identity)

    def __len__(self) -> int:
        """Returns how many captions are known."""
        (count,) = self._base.execute("SELECT COUNT(*) FROM phrases").fetchone()
        return int(count)

    def find(self, captions: Iterable[str]) -> Found:
        """See `regionclip.concepts.phrases.PhraseCache`."""
        return _find(self._base, captions)

    def add(self, found: Mapping[str, list[Phrase]]) -> None:
        """Writes phrases to the disk."""
        rows = [
            (
                _key(caption),
                json.dumps([[p.text, p.head, p.start, p.end] for p in phrases], ensure_ascii=False),
            )
            for caption, phrases in found.items()
        ]
        with naming_full_disk(self._where, sqlite3.OperationalError), self._base as base:
            base.executemany("INSERT OR REPLACE INTO phrases VALUES (?, ?)", rows)

    def close(self) -> None:
        """Closes the file."""
        self._base.close()


class StoredPhrases:
    """What an earlier job left in its `PhraseStore`, only read; what it lacks is remembered for a while.

    Any number of processes may read one file, also on a file system of the network: nothing is locked.
    """

    def __init__(self, path: str | Path, fingerprint: str) -> None:
        """Opens the file.

        Raises:
            InputError: it is missing, damaged, still being written, or was made by another parser.
        """
        self._recent = LRUPhraseCache()
        path = Path(path)
        if not path.is_file():
            raise InputError(f"{path} does not exist")
        if path.with_name(f"{path.name}-journal").exists():
            raise InputError(f"{path} is incomplete; run `regionclip concepts` again")
        try:
            self._base = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
            (parser,) = self._base.execute("SELECT parser FROM identity").fetchone()
        except (sqlite3.DatabaseError, TypeError):
            raise InputError(f"{path} holds no phrases of captions; delete it") from None
        if parser != fingerprint:
            raise InputError(
                f"{path} was made with another spaCy model, list of names or version of this program"
            )

    def find(self, captions: Iterable[str]) -> Found:
        """See `regionclip.concepts.phrases.PhraseCache`."""
        captions = list(captions)
        stored = _find(self._base, captions)
        return stored | self._recent.find(caption for caption in captions if caption not in stored)

    def add(self, found: Mapping[str, list[Phrase]]) -> None:
        """Remembers phrases for a while; the file stays as it is."""
        self._recent.add(found)


def _key(caption: str) -> bytes:
    return hashlib.blake2b(caption.encode(), digest_size=16).digest()


def _find(base: sqlite3.Connection, captions: Iterable[str]) -> Found:
    keys = {_key(caption): caption for caption in captions}
    wanted, found = list(keys), dict[str, list[Phrase]]()
    for start in range(0, len(wanted), _AT_ONCE):
        some = wanted[start : start + _AT_ONCE]
        marks = ",".join("?" * len(some))
        # A damaged row, or what lies behind damage, is parsed anew.
        try:
            query = f"SELECT caption, found FROM phrases WHERE caption IN ({marks})"
            for key, text in base.execute(query, some):
                found[keys[key]] = [Phrase(*values) for values in json.loads(text)]
        except sqlite3.OperationalError:
            raise
        except (sqlite3.DatabaseError, ValueError, TypeError, KeyError, RecursionError):
            continue
    return found
