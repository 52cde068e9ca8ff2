"""Synonyms: alternative class names, their forms in captions, and groups of equal concepts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from regionclip.data.categories import read_classes


def given_classes(lists: list[str]) -> list[tuple[str, ...]]:
    """Returns (name, synonyms…) of all class lists; a class that two lists name has the synonyms of both."""
    merged: dict[str, dict[str, None]] = {}
    for text in lists:
        for name, *synonyms in read_classes(text):
            merged.setdefault(name, {}).update(dict.fromkeys(synonyms))
    return [(name, *(word for word in words if word not in merged)) for name, words in merged.items()]


def aliases_of(classes: list[tuple[str, ...]]) -> dict[str, str]:
    """Returns form in a caption -> given class. A class's own name goes before other classes' synonyms."""
    aliases: dict[str, str] = {}
    for entry in classes:
        aliases.setdefault(_plain(entry[0]), entry[0])
    for entry in classes:
        for form in forms(entry[0]):
            aliases.setdefault(form, entry[0])
    for entry in classes:
        for synonym in entry[1:]:
            for form in forms(synonym):
                aliases.setdefault(form, entry[0])
    return aliases


def forms(name: str) -> list[str]:
    """Returns how a class's name may stand among the phrases, whose heads are singular: "skis", "ski"."""
    plain = _plain(name)
    singular = [plain[:-1]] if plain.endswith("s") and not plain.endswith("ss") else []
    singular += [f"{plain[:-3]}y"] if plain.endswith("ies") else []
    return [plain, *singular]


def _plain(name: str) -> str:
    # LVIS tells "bow (weapon)" from "bow (decorative ribbons)"; captions do not.
    return name.partition("(")[0].replace("_", " ").strip().lower()


def synonym_sets(manifest: dict[str, Any], class_lists: list[str]) -> list[list[str]]:
    """Returns lists of names of one thing: those of the mined pool's classes and of further class lists."""
    classes = [(name, *words) for name, words in manifest.get("synonyms", {}).items()]
    classes += given_classes(class_lists)
    return [[entry[0], *(form for word in entry for form in forms(word))] for entry in classes]


def concept_groups(names: Sequence[str], synonyms: Iterable[Sequence[str]] = ()) -> Tensor:
    """Returns [C] int64, one number for the names of a family: the row of the most general name in it.

    A name belongs to the family of the most general name that it ends with: "small red umbrella" and "red
    umbrella" to that of "umbrella", when the vocabulary holds it. The one is no counterexample of the other.

    Args:
        names: the vocabulary's.
        synonyms: lists of names of one thing, in the vocabulary or not: "red automobile" and "car" are of one
            family when "car" and "automobile" are synonyms.
    """
    rows = {name: row for row, name in enumerate(names)}
    parent = {name: name for name in names}

    def root(word: str) -> str:
        while parent[word] != word:
            word = parent[word]
        return word

    for one_thing in synonyms:
        for word in one_thing:
            parent.setdefault(word, word)
            parent[root(word)] = root(one_thing[0])
    for name in names:
        words = name.split(" ")
        endings = (" ".join(words[start:]) for start in range(len(words) - 1, -1, -1))
        parent[root(name)] = root(next(ending for ending in endings if ending in parent))
    found = [rows.setdefault(root(name), row) for row, name in enumerate(names)]
    return torch.tensor(found, dtype=torch.int64)
