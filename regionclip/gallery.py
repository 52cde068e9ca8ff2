"""The report's pictures: scenes with detections and mined region-phrase pairs, both judged by the truth."""

# D detections of an image, G true boxes, P mined pairs
from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from clip_base.data.images import decode
from clip_base.errors import InputError
from regionclip.boxes import iou
from regionclip.datasets import CocoDetection, Record
from regionclip.pairs import Pair, judge
from regionclip.shards import MinedRegion
from regionclip.structures import Detections
from regionclip.visualize import Colour, draw

SCENES, PAIRS = 12, 36
BASE: Colour = (47, 111, 208)
NOVEL: Colour = (235, 135, 30)
FALSE: Colour = (120, 124, 130)
VERDICTS: dict[str, tuple[str, Colour]] = {
    "right": ("right", (60, 200, 110)),
    "wrong name": ("wrong", (235, 70, 80)),
    "no object": ("nothing", (200, 204, 208)),
    "unknown": ("nothing", (200, 204, 208)),
}
# Seen around a pair's box, in longer sides of the box: enough to tell what the box has cut.
CONTEXT = 1.7
CROP_SIDE = 240
# Letters of a caption that are shown; what people write under pictures on the web may fill a page.
CAPTION = 140
# A detection that scores less than this is never shown, however few there are.
LEAST_SCORE = 0.05
# A detector that has learnt nothing would cover a scene with boxes.
MOST_DRAWN = 10


def data_uri(picture: Image.Image, quality: int = 84) -> str:
    """Returns a picture as a JPEG inside a `data:` address."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def pick_scenes(truth: CocoDetection, novel: Sequence[str], count: int = SCENES) -> list[Record]:
    """Picks scenes by what the truth says is in them, never by how well they were detected.

    Three quarters hold novel objects, each novel category in turn with the earliest scene left that shows it;
    the rest are the earliest scenes with base objects alone. Where one kind runs out, the other fills up.

    Returns:
        At most `count` records, in the file's order.
    """
    labels = [truth.categories.index(name) for name in novel if name in truth.categories]
    holding = {label: [r for r in truth if bool((r.labels == label).any())] for label in labels}
    chosen: dict[int, Record] = {}
    wanted = count * 3 // 4
    while len(chosen) < wanted:
        before = len(chosen)
        for label in labels:
            fresh = next((r for r in holding[label] if r.image_id not in chosen), None)
            if fresh is not None and len(chosen) < wanted:
                chosen[fresh.image_id] = fresh
        if len(chosen) == before:
            break
    with_novel = {record.image_id for records in holding.values() for record in records}
    only_base = [r for r in truth if len(r.labels) and r.image_id not in with_novel]
    for record in [*only_base, *truth]:
        if len(chosen) >= count:
            break
        chosen[record.image_id] = record
    return [record for record in truth if record.image_id in chosen]


def best_threshold(truth: CocoDetection, found: dict[int, Detections]) -> float:
    """Returns the score at which drawing a detection or not makes the fewest mistakes, by F1 over all scenes.

    Args:
        truth: the scenes' annotations.
        found: image id -> detections; names in the order of `truth.categories`.
    """
    scored: list[tuple[float, bool]] = []
    objects = 0
    for record in truth:
        single = record.without_crowds()
        objects += len(single.boxes)
        if record.image_id in found:
            scored += _matches(found[record.image_id].above(LEAST_SCORE), single)
    best, threshold, right = 0.0, 0.5, 0
    for number, (score, is_right) in enumerate(sorted(scored, reverse=True), start=1):
        right += is_right
        f1 = 2 * right / (number + objects)
        if f1 > best:
            best, threshold = f1, score
    return threshold


def worth_drawing(detections: Detections, threshold: float) -> Detections:
    """Returns the best MOST_DRAWN of the detections that score at least `threshold`."""
    enough = detections.above(threshold)
    return enough[enough.scores.argsort(descending=True, stable=True)[:MOST_DRAWN]]


def _matches(detections: Detections, record: Record) -> list[tuple[float, bool]]:
    """Returns each detection's score and whether it takes a true box of its name, the best score first."""
    same = detections.labels[:, None] == record.labels[None]
    overlaps = iou(detections.boxes, record.boxes) * same  # [D, G]
    free = torch.ones(len(record.boxes), dtype=torch.bool)
    matches = []
    hopeful = (overlaps >= 0.5).any(1).tolist()
    for row in detections.scores.argsort(descending=True, stable=True).tolist():
        taken = False
        if hopeful[row]:
            left = overlaps[row] * free
            place = int(left.argmax())
            taken = bool(left[place] >= 0.5)
            free[place] &= not taken
        matches.append((float(detections.scores[row]), taken))
    return matches


def scene_figure(record: Record, detections: Detections, truth: CocoDetection, novel: Sequence[str]) -> str:
    """Returns a scene with its detections drawn, and under it which true objects they found and which not."""
    names = [detections.names[label] for label in detections.labels.tolist()]
    boxes = detections.boxes.tolist()
    pairs = [Pair(record.image_id, _four(box), name) for box, name in zip(boxes, names, strict=True)]
    right = [word == "right" for word in judge(pairs, truth, images={record.image_id}).words()]
    texts = [
        f"{'' if true else '✗ '}{_starred(name, novel)} {score:.2f}"
        for name, score, true in zip(names, detections.scores.tolist(), right, strict=True)
    ]
    colours = [
        (NOVEL if name in novel else BASE) if true else FALSE for name, true in zip(names, right, strict=True)
    ]
    picture = draw(decode(record.path), detections, texts=texts, colours=colours)
    single = record.without_crowds()
    same = detections.labels[:, None] == single.labels[None]
    is_found = ((iou(detections.boxes, single.boxes) >= 0.5) & same).any(0).tolist()  # [G]
    true_names = [_starred(truth.categories[label], novel) for label in single.labels.tolist()]
    lines = []
    for word, wanted in (("found", True), ("missed", False)):
        those = [name for name, one in zip(true_names, is_found, strict=True) if one is wanted]
        if those:
            lines.append(f"<b>{word}</b> {escape(_counted(those))}")
    caption = " · ".join(lines) or "no object of these categories"
    alt = f"detections in {record.path.name}"
    return _figure(picture, alt, caption)


def _starred(name: str, novel: Sequence[str]) -> str:
    return f"★ {name}" if name in novel else name


def _counted(names: Sequence[str]) -> str:
    return ", ".join(name if count == 1 else f"{count} × {name}" for name, count in Counter(names).items())


def pick_pairs(regions: Sequence[MinedRegion], count: int = PAIRS) -> list[int]:
    """Picks pairs from all scores and over the concepts, whether they are right or wrong.

    The pairs, sorted by probability, are cut into `count` equal parts; from each comes the first pair of the
    concept that was picked least so far.

    Returns:
        Places in `regions`, the most probable first.
    """
    order = sorted(range(len(regions)), key=lambda place: (-regions[place].concept_probs[0], place))
    count = min(count, len(order))
    used: Counter[str] = Counter()
    images: Counter[int] = Counter()
    chosen = []
    for part in range(count):
        places = order[part * len(order) // count : (part + 1) * len(order) // count]
        best = min(places, key=lambda place: (used[regions[place].concept], images[regions[place].image_id]))
        used[regions[best].concept] += 1
        images[regions[best].image_id] += 1
        chosen.append(best)
    return chosen


def pair_figure(folder: Path, region: MinedRegion, verdict: str | None) -> str:
    """Returns a mined region with its surroundings, its concept, probability, verdict and caption.

    Args:
        folder: what the region's file name is relative to.
        region: the pair.
        verdict: a key of VERDICTS; None: there is no truth to judge by.
    """
    style, colour = VERDICTS[verdict] if verdict else ("", BASE)
    picture = _crop(folder / region.file_name, region.box, colour)
    word = "cannot be judged" if verdict == "unknown" else verdict
    parts = [
        f"<b>{escape(region.concept)}</b> {region.concept_probs[0]:.2f}",
        f'<span class="tag {style}">{word}</span>' if verdict else "",
        f'<span class="caption">{_caption(region)}</span>',
    ]
    alt = f"a region of {Path(region.file_name).name} named {region.concept}"
    return _figure(picture, alt, "".join(parts))


class Album:
    """Pictures of mined regions for one page, which together stay below a number of bytes.

    Args:
        folder: what the regions' file names are relative to.
        limit: bytes that all figures may take, as text in the page.

    Attributes:
        shown: figures made.
        left_out: regions without a figure, since the page was full.
        unreadable: regions without a figure, since their picture could not be read.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self._left = folder, limit
        self.shown = self.left_out = self.unreadable = 0

    def figures(self, regions: Sequence[MinedRegion], verdicts: Sequence[str | None]) -> str:
        """Returns the figures of some regions, in their order, as far as there is room."""
        made = []
        for region, verdict in zip(regions, verdicts, strict=True):
            if self._left <= 0:
                self.left_out += 1
                continue
            try:
                figure = pair_figure(self.folder, region, verdict)
            except InputError:
                self.unreadable += 1
                continue
            if len(figure) > self._left:
                self._left = 0  # a smaller one after it would hide that the page is full
                self.left_out += 1
                continue
            self._left -= len(figure)
            self.shown += 1
            made.append(figure)
        return "".join(made)


def pick_concepts(counts: Mapping[str, int], limit: int) -> list[str]:
    """Picks concepts to show: half are the most frequent ones, half are spread evenly over the rest.

    Args:
        counts: concept -> regions.
        limit: most concepts to pick.

    Returns:
        Names, the most frequent first.
    """
    names = [name for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if count]
    if len(names) <= limit:
        return names
    frequent = limit - limit // 2
    rest = names[frequent:]
    spread = limit // 2
    return names[:frequent] + [rest[(2 * place + 1) * len(rest) // (2 * spread)] for place in range(spread)]


def box_figure(path: Path, box: Sequence[float], colour: Colour, caption: str, alt: str) -> str:
    """Returns a box (x1, y1, x2, y2) of a picture with some of its surroundings; `caption` is HTML."""
    return _figure(_crop(path, box, colour), alt, caption)


def _figure(picture: Image.Image, alt: str, caption: str) -> str:
    image = f'<img src="{data_uri(picture)}" alt="{escape(alt)}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _caption(region: MinedRegion) -> str:
    """Returns the caption, cut around the phrase, with the phrase underlined where it stands word by word.

    A phrase that stands there in another form ("people" for "person") is put before the caption.
    """
    if not region.caption:
        return "not named in a caption"
    phrase = region.phrase or ""
    start = region.caption.casefold().find(phrase.casefold())
    if not phrase or start < 0:
        said = f"<mark>{escape(phrase)}</mark>: " if phrase else ""
        return said + escape(_cut(region.caption, len(region.caption) - CAPTION))
    end = start + len(phrase)
    room = max(CAPTION - len(phrase), 0)
    before, within, after = region.caption[:start], region.caption[start:end], region.caption[end:]
    drop_before = max(len(before) - max(room // 2, room - len(after)), 0)
    drop_after = len(after) - (room - len(before) + drop_before)
    shown = escape(_cut(before, drop_before, True)), escape(within), escape(_cut(after, drop_after))
    return "{}<mark>{}</mark>{}".format(*shown)


def _cut(text: str, letters: int, at_start: bool = False) -> str:
    """Returns the text without its last letters, or its first ones."""
    if letters <= 0:
        return text
    return "…" + text[letters:] if at_start else text[:-letters] + "…"


def _crop(path: Path, box: Sequence[float], colour: Colour) -> Image.Image:
    """Returns a square around the box, moved into the picture where it reaches out, with the box drawn."""
    picture = Image.fromarray(decode(path))
    x1, y1, x2, y2 = box
    side = min(CONTEXT * max(x2 - x1, y2 - y1, 8.0), min(picture.size))
    left = min(max((x1 + x2 - side) / 2, 0), picture.width - side)
    top = min(max((y1 + y2 - side) / 2, 0), picture.height - side)
    crop = picture.resize(
        (CROP_SIDE, CROP_SIDE), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)
    )
    factor = CROP_SIDE / side
    edges = [(x1 - left) * factor, (y1 - top) * factor, (x2 - left) * factor, (y2 - top) * factor]
    inside = [min(max(edge, 1), CROP_SIDE - 2) for edge in edges]
    pen = ImageDraw.Draw(crop)
    pen.rectangle([inside[0] - 1, inside[1] - 1, inside[2] + 1, inside[3] + 1], outline=(20, 20, 20), width=5)
    pen.rectangle(inside, outline=colour, width=3)
    return crop


def _four(values: Sequence[float]) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = values
    return x1, y1, x2, y2
