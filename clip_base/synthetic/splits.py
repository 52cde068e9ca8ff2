"""Which categories of a synthetic dataset are novel: spread over the table, or drawn so that both are alike.

In a fair comparison base and novel categories can be exchanged: novel ones are drawn by seed, as frequent and
as large as the others, and as easy to tell apart. How easy a category is was measured once, as the share of
its true boxes that a classifier trained on all categories names correctly (`benchmarks/distinctness.py`), and
is kept in `data_files/distinctness.csv`.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Sequence
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

from clip_base.runtime.errors import InputError

SPLITS_OF_CATEGORIES = ("spread", "balanced")
FILE = "distinctness.csv"


def spread(names: Sequence[str], count: int) -> list[str]:
    """Returns `count` novel names, spread evenly over the list."""
    return [names[int((i + 0.5) * len(names) / count)] for i in range(count)]


def balanced(names: Sequence[str], count: int, seed: int) -> list[str]:
    """Returns `count` novel names that are as easy to tell apart as the rest, drawn by seed.

    The names are sorted by their distinctness and cut into `count` groups of neighbors, of each of which one
    name is drawn. So every name can be novel, with nearly equal probability.

    Args:
        names: all names of the dataset, in its order, which the result keeps.
        count: from 1 to the number of names.
        seed: determines the draw.

    Raises:
        InputError: the distinctness of a name was not measured.
    """
    measured = distinctness()
    unknown = [name for name in names if name not in measured]
    if unknown:
        raise InputError(
            f"split=balanced needs the distinctness of every category, {FILE} has none of "
            f"{', '.join(unknown[:3])} ({len(unknown)} in all); use fewer categories or split=spread"
        )
    ranked = sorted(names, key=lambda name: measured[name])
    groups = np.array_split(np.arange(len(ranked)), count)
    rng = np.random.default_rng([seed, len(names), count])
    drawn = {ranked[int(rng.choice(group))] for group in groups}
    return [name for name in names if name in drawn]


def long_tail(count: int, tail: float, seed: int) -> NDArray[np.float64]:
    """Returns [count], the probability that an object is of a category or of one before it in the list.

    Frequencies fall as 1 / rank^tail, Zipf's law; which category has which rank is drawn by seed, so that
    rare ones are as easy to tell apart as frequent ones on average.
    """
    ranks = np.random.default_rng([seed, count]).permutation(count) + 1
    chances = np.cumsum(1.0 / ranks**tail)
    return np.asarray(chances / chances[-1])


@functools.cache
def distinctness() -> dict[str, float]:
    """Returns for each name the share of its true boxes that a supervised classifier named correctly."""
    text = (files("clip_base") / "data_files" / FILE).read_text(encoding="utf-8")
    return {row["category"]: float(row["accuracy"]) for row in csv.DictReader(text.splitlines())}
