"""Balanced splits, variants of categories, and synonyms in captions."""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_base.runtime.errors import InputError
from clip_base.synthetic import painting, pictograms
from clip_base.synthetic.captions import Backdrop, Seen, Style, counted, describe
from clip_base.synthetic.pictograms import TABLE, with_variants
from clip_base.synthetic.scenes import ScenesConfig, all_categories, generate, novel_names
from clip_base.synthetic.splits import balanced, distinctness, long_tail

FAIR = {"split": "balanced", "categories": 32, "novel": 8}


def config(**options: Any) -> ScenesConfig:
    return ScenesConfig(out="", **options)


def test_every_category_and_variant_has_a_measured_distinctness():
    names = {one.name for one in TABLE} | {one.name for one in all_categories(config(**HARD))}
    assert names <= distinctness().keys()
    assert all(0 < value <= 1 for value in distinctness().values())


HARD = {"categories": 35, "attributes": ["striped", "tall"]}


@pytest.mark.parametrize(("options", "novel"), [({}, 8), (HARD, 26)])
def test_balanced_novel_categories_are_as_easy_as_base_ones(options: dict[str, Any], novel: int):
    measured, gaps = distinctness(), []
    for seed in range(40):
        chosen = config(**{**FAIR, **options, "novel": novel, "seed": seed})
        names = [one.name for one in all_categories(chosen)]
        drawn = novel_names(chosen)
        assert len(drawn) == novel
        assert drawn == [name for name in names if name in drawn]
        own = statistics.mean(measured[name] for name in drawn)
        gaps.append(own - statistics.mean(measured[name] for name in names if name not in drawn))
    assert abs(statistics.mean(gaps)) < 0.01
    assert max(map(abs, gaps)) < 0.06


def test_every_category_is_novel_for_some_seeds():
    count = Counter(name for seed in range(200) for name in novel_names(config(**FAIR, seed=seed)))
    assert len(count) == 32
    assert 20 < min(count.values()) <= max(count.values()) < 90
    assert novel_names(config(**FAIR, seed=3)) == novel_names(config(**FAIR, seed=3))


def test_a_category_that_was_not_measured_is_not_balanced():
    with pytest.raises(InputError, match=r"has none of griffin \(1 in all\).*split=spread"):
        balanced(["star", "griffin"], 1, seed=0)


def test_the_dataset_says_which_categories_are_novel(tmp_path: Path):
    options = {"categories": 3, "attributes": ["tall"], "novel": 2, "split": "balanced", "seed": 1}
    small = ScenesConfig(out=str(tmp_path), images=3, val_images=1, size=64, workers=1, **options)
    generate(small)
    split = json.loads((tmp_path / "split.json").read_text())
    names = [one["name"] for one in json.loads((tmp_path / "instances_val.json").read_text())["categories"]]
    assert names == ["airplane", "anchor", "umbrella", "tall airplane", "tall anchor", "tall umbrella"]
    assert split["novel"] == novel_names(small)
    assert sorted(split["base"] + split["novel"]) == sorted(names)
    record = json.loads((tmp_path / "scenes.json").read_text())
    assert (record["novel"], record["split"], record["attributes"]) == (2, "balanced", ["tall"])


@pytest.mark.parametrize("attributes", [["shiny"], ["tall", "tall"]])
def test_attributes_that_cannot_be_drawn_are_refused(attributes: list[str]):
    with pytest.raises(InputError, match="give each of striped, tall at most once"):
        config(attributes=attributes)


def test_variants_count_as_categories():
    assert config(categories=3, attributes=["tall", "striped"], novel=8).novel == 8
    with pytest.raises(InputError, match="novel=9 is too large; give 8 or less"):
        config(categories=3, attributes=["tall", "striped"], novel=9)


def test_variants_are_named_and_counted_in_english():
    names = [one for one in TABLE if one.name in ("mouse", "scissors", "cup")]
    scissors, cup, mouse, *striped = with_variants(names, ["striped"])
    assert [one.name for one in striped] == ["striped scissors", "striped cup", "striped mouse"]
    assert counted(striped[0], 2, "red") == "two pairs of red striped scissors"
    assert counted(striped[2], 2) == "two striped mice"
    assert striped[1].synonyms == ("striped mug",)
    assert (scissors, cup, mouse) == tuple(names)


def test_tall_things_are_taller_and_no_larger():
    (star,) = [one for one in TABLE if one.name == "star"]
    tall = with_variants([star], ["tall"])[1]
    ratios = []
    for seed in range(50):
        height, width = painting.warped(tall, 60.0, np.random.default_rng(seed)).coverage.shape[:2]
        assert max(height, width) <= 60 * 1.3
        ratios.append(height / width)
    assert 1.5 < statistics.median(ratios) < 2.1


def test_striped_things_have_stripes_where_they_have_a_body():
    plain, striped = with_variants([one for one in TABLE if one.name == "heart"], ["striped"])
    body, lines = np.moveaxis(pictograms.levels(striped)[0], -1, 0)
    assert (body == pictograms.levels(plain)[0][..., 0]).all()
    assert not pictograms.levels(plain)[0][..., 1].any()
    assert (lines <= body).all()
    assert 0.35 < (lines[body > 127] > 127).mean() < 0.65


def texts(share: float, count: int = 300) -> list[str]:
    (cup,) = [one for one in TABLE if one.name == "cup"]
    objects = [Seen(cup, (0.1, 0.1, 0.2, 0.2), "red"), Seen(cup, (0.6, 0.6, 0.2, 0.2), "blue")]
    rng, style = np.random.default_rng(0), Style(mention=1.0, colors=0.1, synonyms=share)
    return [describe(objects, Backdrop("green", ("soft",)), style, rng) for _ in range(count)]


def test_captions_use_synonyms_as_often_as_they_should():
    assert not any("mug" in text for text in texts(0.0))
    found = [bool(re.search(r"\btwo (red |blue )?mugs\b", text.lower())) for text in texts(0.3)]
    assert 0.2 < np.mean(found) < 0.4
    assert all(re.search(r"\btwo ([a-z]+ )?(mugs|cups)\b", text.lower()) for text in texts(0.3))
    assert not any("cup" in text for text in texts(1.0))


def test_no_synonym_is_the_name_of_another_category():
    names = {one.name for one in TABLE} | {one.plural for one in TABLE}
    synonyms = [noun for one in TABLE for noun in one.synonyms]
    assert not names & set(synonyms)
    assert len(set(synonyms)) == len(synonyms) > 25


def test_a_long_tail_is_in_training_images_alone(tmp_path: Path):
    options: dict[str, Any] = {"images": 400, "val_images": 400, "categories": 8, "size": 32, "workers": 1}
    options |= {"objects_max": 1, "object_min": 0.4, "distractors": 0}
    generate(ScenesConfig(out=str(tmp_path), tail=1.5, seed=3, **options))
    counts = {}
    for split in ("train", "val"):
        content = json.loads((tmp_path / f"instances_{split}.json").read_text())
        found = Counter(entry["category_id"] for entry in content["annotations"])
        counts[split] = [found[entry["id"]] for entry in content["categories"]]
    expected = np.diff(long_tail(8, 1.5, 3), prepend=0)
    assert sorted(expected)[::-1] == pytest.approx(
        (1 / np.arange(1, 9) ** 1.5) / sum(1 / np.arange(1, 9) ** 1.5)
    )
    for share, seen, even in zip(expected, counts["train"], counts["val"], strict=True):
        assert abs(seen - 400 * share) < 4.5 * (400 * share) ** 0.5 + 1
        assert abs(even - 50) < 4.5 * 50**0.5
    assert np.diff(long_tail(8, 1.5, 4)).argmax() != np.diff(long_tail(8, 1.5, 3)).argmax()
