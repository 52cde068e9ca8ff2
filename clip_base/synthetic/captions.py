"""English captions of generated scenes: varied, true, and incomplete."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from clip_base.synthetic.pictograms import Category

T = TypeVar("T")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_LARGE, _SMALL = 0.42, 0.24
_SIZE_WORDS = 0.06
_BACKDROPS = 0.12
_RELATIONS = 0.6


@dataclass(frozen=True)
class Seen:
    """One object of a scene, as a caption may speak of it.

    Attributes:
        category: what it is.
        box: (x, y, width, height) of its visible part, as shares of the picture's sides.
        color: the name of its color.
        behind: positions, in the scene's list, of the objects that cover a part of it.
    """

    category: Category
    box: tuple[float, float, float, float]
    color: str
    behind: tuple[int, ...] = ()


@dataclass(frozen=True)
class Backdrop:
    """What can be said of a background: its color's name, and adjectives that fit its texture."""

    color: str
    textures: tuple[str, ...]


@dataclass(frozen=True)
class Style:
    """How captions speak.

    Attributes:
        mention: probability that a kind of object in the scene is named; at least one always is.
        colors: share of the noun phrases for objects that carry a color word.
        synonyms: share of the noun phrases that use another noun than the category's name, if it has one.
    """

    mention: float
    colors: float
    synonyms: float = 0.0


@dataclass(frozen=True)
class _Group:
    """All objects of one category in a scene: a caption names all of them or none."""

    category: Category
    members: tuple[int, ...]
    colors: tuple[str, ...]
    box: tuple[float, float, float, float]
    sides: tuple[float, ...]


def describe(objects: Sequence[Seen], backdrop: Backdrop, style: Style, rng: np.random.Generator) -> str:
    """Returns one caption of a scene that holds at least one object."""
    groups = _groups(objects)
    named = [group for group in groups if rng.random() < style.mention] or [_pick(groups, rng)]
    named = [named[i] for i in rng.permutation(len(named))]
    if len(named) == 1:
        text = _one(named[0], backdrop, style, rng)
    elif len(named) == 2:
        text = _two(named[0], named[1], objects, backdrop, style, rng)
    else:
        text = _many(named, objects, backdrop, style, rng)
    if rng.random() < 0.3:
        text = text[0].upper() + text[1:] + "."
    return text


def counted(category: Category, count: int, adjectives: str = "") -> str:
    """Returns "an anchor", "two red anchors", "a pair of red scissors"; `adjectives` precede the noun."""
    noun = category.name if count == 1 else category.plural
    phrase = f"{adjectives} {noun}".strip()
    if category.paired:
        return f"a pair of {phrase}" if count == 1 else f"{_number(count)} pairs of {phrase}"
    if count > 1:
        return f"{_number(count)} {phrase}"
    return f"{_article(phrase)} {phrase}"


def _number(count: int) -> str:
    return NUMBERS[count] if count < len(NUMBERS) else str(count)


def _article(phrase: str) -> str:
    return "an" if phrase[0] in "aeiou" else "a"


def _pick(choices: Sequence[T], rng: np.random.Generator) -> T:
    return choices[int(rng.random() * len(choices))]


def _groups(objects: Sequence[Seen]) -> list[_Group]:
    members: dict[Category, list[int]] = {}
    for index, seen in enumerate(objects):
        members.setdefault(seen.category, []).append(index)
    groups = []
    for category, indices in members.items():
        boxes = [objects[i].box for i in indices]
        left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
        right, bottom = max(box[0] + box[2] for box in boxes), max(box[1] + box[3] for box in boxes)
        colors = tuple(objects[i].color for i in indices)
        sides = tuple(max(box[2:]) for box in boxes)
        groups.append(_Group(category, tuple(indices), colors, (left, top, right, bottom), sides))
    return groups


def _phrase(group: _Group, style: Style, rng: np.random.Generator) -> str:
    """A noun phrase that counts the group, seldom with a size, now and then with the color all of it has."""
    words = []
    if rng.random() < _SIZE_WORDS:
        if min(group.sides) > _LARGE:
            words.append(_pick(("large", "big", "huge"), rng))
        elif max(group.sides) < _SMALL:
            words.append(_pick(("small", "little", "tiny"), rng))
    if rng.random() < style.colors and len(set(group.colors)) == 1:
        words.append(group.colors[0])
    return counted(_called(group.category, style, rng), len(group.members), " ".join(words))


def _called(category: Category, style: Style, rng: np.random.Generator) -> Category:
    """Returns the category under its own name or, now and then, under a synonym."""
    if not category.synonyms or not style.synonyms or rng.random() >= style.synonyms:
        return category
    return replace(category, name=_pick(category.synonyms, rng), irregular="")


def _be(group: _Group) -> str:
    return "is" if len(group.members) == 1 else "are"


def _behind(backdrop: Backdrop, style: Style, rng: np.random.Generator) -> str:
    """A few words on the background, or none; its color is named no more often than an object's."""
    if rng.random() >= _BACKDROPS:
        return ""
    word = backdrop.color if rng.random() < 2 * style.colors else _pick(backdrop.textures, rng)
    return _pick(
        (f" on {_article(word)} {word} background", f" against {_article(word)} {word} backdrop"), rng
    )


def _one(group: _Group, backdrop: Backdrop, style: Style, rng: np.random.Generator) -> str:
    if len(group.members) == 2 and len(set(group.colors)) == 2 and rng.random() < style.colors:
        things = counted(_called(group.category, style, rng), 2)
        first, second = group.colors
        return _pick(
            (
                f"{things}; one is {first}",
                f"{things}, one of them {second}",
                f"there are {things}, one {first} and the other {second}",
            ),
            rng,
        )
    things, where = _phrase(group, style, rng), ""
    if rng.random() < 0.5:
        where = _place(group, rng)
    where = where or _behind(backdrop, style, rng)
    be = _be(group)
    return _pick(
        (
            f"{things}{where}",
            f"a picture of {things}{where}",
            f"a photo of {things}{where}",
            f"there {be} {things}{where}",
            f"a scene with {things}{where}",
            f"{things} can be seen{where}",
            f"this picture shows {things}{where}",
            f"an image that shows {things}{where}",
            f"someone has drawn {things}{where}",
            f"what we see here {be} {things}{where}",
        ),
        rng,
    )


def _two(
    first: _Group,
    second: _Group,
    objects: Sequence[Seen],
    backdrop: Backdrop,
    style: Style,
    rng: np.random.Generator,
) -> str:
    one, other, be = _phrase(first, style, rng), _phrase(second, style, rng), _be(first)
    relations = _relations(first, second, objects)
    if relations and rng.random() < _RELATIONS:
        relation, tail = _pick(relations, rng), _behind(backdrop, style, rng)
        return _pick(
            (
                f"{one} {relation} {other}{tail}",
                f"there {be} {one} {relation} {other}{tail}",
                f"a picture of {one} {relation} {other}{tail}",
                f"{one} {be} {relation} {other}{tail}",
                f"{one} can be seen {relation} {other}{tail}",
                f"we see {one} {relation} {other}{tail}",
            ),
            rng,
        )
    tail = _behind(backdrop, style, rng)
    return _pick(
        (
            f"{one} and {other}{tail}",
            f"{one} with {other}{tail}",
            f"a photo of {one} and {other}{tail}",
            f"there {be} {one} and {other}{tail}",
            f"a scene with {one} and {other}{tail}",
            f"this picture shows {one} as well as {other}{tail}",
            f"{one}{_place(first, rng)}, and {other}{_place(second, rng)}",
            f"here {be} {one}, and there {_be(second)} also {other}{tail}",
        ),
        rng,
    )


def _many(
    groups: Sequence[_Group],
    objects: Sequence[Seen],
    backdrop: Backdrop,
    style: Style,
    rng: np.random.Generator,
) -> str:
    phrases = [_phrase(group, style, rng) for group in groups]
    relations = _relations(groups[0], groups[1], objects)
    if relations and rng.random() < _RELATIONS:
        start = f"{phrases[0]} {_pick(relations, rng)} {phrases[1]}"
        rest = _listed(phrases[2:])
        be = _be(groups[0])
        return _pick(
            (
                f"{start}, as well as {rest}",
                f"there {be} {start}, with {rest} elsewhere",
                f"{start}; also {rest}",
            ),
            rng,
        )
    things, tail = _listed(phrases), _behind(backdrop, style, rng)
    return _pick(
        (
            f"{things}{tail}",
            f"a photo of {things}{tail}",
            f"a picture with {things}{tail}",
            f"there {_be(groups[0])} {things}{tail}",
            f"the picture shows {things}{tail}",
        ),
        rng,
    )


def _listed(phrases: Sequence[str]) -> str:
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def _relations(first: _Group, second: _Group, objects: Sequence[Seen]) -> list[str]:
    """Returns the prepositions that truly relate every member of `first` to every member of `second`."""
    relations = []
    if len(first.members) == 1 and len(second.members) == 1:
        mine, yours = first.members[0], second.members[0]
        if yours in objects[mine].behind:
            relations.append("behind")
        if mine in objects[yours].behind:
            relations.append("in front of")
    ax, ay, ar, ab = first.box
    bx, by, br, bb = second.box
    gap_x, gap_y = max(bx - ar, ax - br), max(by - ab, ay - bb)
    if gap_x >= 0 and gap_x >= gap_y:
        relations.append("left of" if ar <= bx else "right of")
        relations.append("to the left of" if ar <= bx else "to the right of")
    if gap_y >= 0 and gap_y >= gap_x:
        relations.extend(("above", "over") if ab <= by else ("below", "under"))
    gap = max(gap_x, gap_y)
    if len(first.members) == 1 and -0.1 < gap < 0.12:
        relations.append("near")
        if gap_x == gap:
            relations.extend(("next to", "beside"))
    return relations


def _place(group: _Group, rng: np.random.Generator) -> str:
    """Says where all of a group lies, or nothing when it lies nowhere in particular."""
    left, top, right, bottom = group.box
    across = "left" if right < 0.5 else "right" if left > 0.5 else ""
    down = "top" if bottom < 0.5 else "bottom" if top > 0.5 else ""
    if across and down:
        side = "upper" if down == "top" else "lower"
        return _pick((f" in the {side} {across} corner", f" at the {down} {across}"), rng)
    if down:
        return _pick((f" at the {down}", f" in the {'upper' if down == 'top' else 'lower'} half"), rng)
    if across:
        return _pick(
            (f" on the {across} side", f" on the {across}", f" in the {across} half of the image"), rng
        )
    central = abs(left + right - 1) < 0.3 and abs(top + bottom - 1) < 0.3
    if central and len(group.members) == 1:
        return _pick((" in the middle of the picture", " in the centre", " in the middle"), rng)
    return ""
