"""Mutations of trees of JSON: values of other types, parts that are gone, repeated or renamed."""

from __future__ import annotations

import json
import random
from typing import Any


def _deep(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def values(rng: random.Random) -> Any:
    """Returns a value of JSON that is seldom what a reader expects."""
    return rng.choice(
        (
            *(
                None,
                True,
                False,
                0,
                -1,
                1,
                7.5,
                1e308,
                -1e-320,
                float("nan"),
                float("inf"),
                2**31,
                2**63,
                2**64,
            ),
            *(10**400, "", " ", "7", "7.0", "nan", "x", "é\u202e", "\ud800", "a\0b", "x" * 300, "x" * 70_000),
            *("../../x.jpg", "/etc/passwd", "~", "-", "http://x/y", "${a}", [], {}, [[]], [None], [1, "a"]),
            *(
                {"name": "x"},
                {"id": 1},
                {"a": {"a": {}}},
                ["a"] * 1000,
                list(range(1000)),
                _deep(60),
                [1e30] * 4,
            ),
            *([-5, -5, 0, 0], [float("nan")] * 4, "2024-01-01", "1e5", "None", -(2**63) - 1, 1.0, 3.0000001),
        )
    )


def spots(tree: Any) -> list[tuple[Any, Any]]:
    """Returns each place of a tree, as what holds it and its key."""
    found, queue = [], [tree]
    while queue:
        node = queue.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            found.append((node, key))
            queue.append(node[key])
    return found


def change_tree(rng: random.Random, tree: Any) -> Any:
    """Changes one or a few places of a tree of JSON; returns the tree, which may be another."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = spots(tree)
        if not places or rng.random() < 0.02:
            return values(rng)
        node, key = rng.choice(places)
        kind = rng.randrange(8)
        if kind < 4:
            node[key] = values(rng)
        elif kind == 4:
            del node[key]
        elif kind == 5:
            other, at = rng.choice(places)
            node[key] = json.loads(json.dumps(other[at], default=str)) if at in spots_keys(other) else None
        elif kind == 6 and isinstance(node, list):
            node += [json.loads(json.dumps(node[key]))] * rng.choice((1, 2, 50))
        elif isinstance(node, dict):
            node[rng.choice(("", "id", "name", "\0", "x" * 200, f"{key}_"))] = node.pop(key)
    return tree


def spots_keys(node: Any) -> Any:
    """Returns the keys of a dictionary, the places of a list."""
    return node if isinstance(node, dict) else range(len(node))


def dump(tree: Any) -> bytes:
    """Returns JSON as a careless program writes it, NaN and half surrogates included."""
    return json.dumps(tree).encode()
