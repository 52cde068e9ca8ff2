"""Matchers against the same rules written as loops over single regions and concepts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_base.jobs import plugins
from clip_base.jobs.cli import main_regionclip
from clip_base.jobs.config import fields_of
from clip_base.runtime.errors import InputError
from regionclip.concepts.synonyms import concept_groups
from regionclip.mining.matchers.base import GROUP, Matches, MatchInputs
from regionclip.mining.matchers.caption import CaptionConfig, CaptionMatcher
from regionclip.mining.matchers.exclusive import ExclusiveConfig, ExclusiveMatcher
from regionclip.mining.matchers.hybrid import HybridConfig, HybridMatcher
from regionclip.mining.matchers.pool import PoolConfig, PoolMatcher

NAMES = ["cup", "umbrella", "red umbrella", "small red umbrella", "star", "sea star", "tree", "kite"]
TEMPERATURE = 0.05


def evidence(
    n: int = 9, own: tuple[int, ...] = (1, 4), seed: int = 0, temperature: float = TEMPERATURE
) -> MatchInputs:
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.rand(n, len(NAMES), generator=generator) * 0.4
    objectness = torch.rand(n, generator=generator)
    corners = torch.rand(n, 2, generator=generator) * 20
    boxes = torch.cat([corners, corners + 5 + torch.rand(n, 2, generator=generator) * 20], 1)
    return MatchInputs(similarity, objectness, torch.tensor(own).long(), temperature, boxes)


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    powers = [math.exp(value - top) for value in values]
    return [power / math.fsum(powers) for power in powers]


def family(name: str) -> str:
    """The shortest ending of a name, in whole words, that is a name of the pool."""
    words = name.split(" ")
    endings = [" ".join(words[start:]) for start in range(len(words))]
    return min((ending for ending in endings if ending in NAMES), key=len)


def naive_posterior(case: MatchInputs, row: int, trust: float) -> dict[int, float]:
    """Bayes' rule in plain numbers: own concepts share `trust`, the strangers the rest."""
    own = case.caption_concepts.tolist()
    relatives = {family(NAMES[concept]) for concept in own}
    strangers = [concept for concept, name in enumerate(NAMES) if family(name) not in relatives]
    likelihood = [math.exp(float(value) / case.temperature) for value in case.similarity[row]]
    mine = {concept: trust / len(own) * likelihood[concept] for concept in own}
    rest = math.fsum((1 - trust) / len(strangers) * likelihood[concept] for concept in strangers)
    whole = math.fsum(mine.values()) + rest
    return {concept: value / whole for concept, value in mine.items()}


def as_rows(match: Matches) -> dict[int, list[tuple[int, float]]]:
    return {
        int(kept): list(zip(ids.tolist(), probs.tolist(), strict=True))
        for kept, ids, probs in zip(match.indices, match.concept_ids, match.concept_probs, strict=True)
    }


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("min_probability", [0.1, 0.4, 0.99])
@pytest.mark.parametrize("keep_all", [True, False])
def test_pool_is_the_naive_softmax_rule(seed: int, min_probability: float, keep_all: bool) -> None:
    case = evidence(seed=seed)
    match = PoolMatcher(PoolConfig(min_probability, 0.3, keep_all, k=3), NAMES)(case)
    probabilities = [softmax([float(v) / TEMPERATURE for v in row]) for row in case.similarity]
    objects = [row for row in range(9) if case.objectness[row] >= 0.3]
    sure = [row for row in objects if max(probabilities[row]) >= min_probability]
    assert match.indices.tolist() == (sure or (objects if keep_all else []))
    for row, found in as_rows(match).items():
        best = sorted(range(len(NAMES)), key=lambda c, row=row: -probabilities[row][c])[:3]
        assert [concept for concept, _ in found] == best
        assert [prob for _, prob in found] == pytest.approx([probabilities[row][c] for c in best], rel=1e-4)
    assert match.from_caption.tolist() == [int(ids[0]) in (1, 4) for ids in match.concept_ids]


def test_pool_keeps_no_more_concepts_than_there_are() -> None:
    match = PoolMatcher(PoolConfig(0.0, k=50), NAMES)(evidence())
    assert match.concept_ids.shape == (9, len(NAMES))
    torch.testing.assert_close(match.concept_probs.sum(1), torch.ones(9))


@pytest.mark.parametrize("own", [(1, 4), (0,), (2,), (3, 5, 6), (1, 2)])
def test_caption_posterior_is_bayes_rule(own: tuple[int, ...]) -> None:
    matcher = CaptionMatcher(CaptionConfig(caption_prior=0.8), NAMES)
    case = evidence(own=own)
    found = matcher.posterior(case)
    for row in range(9):
        wanted = naive_posterior(case, row, 0.8)
        assert found[row].tolist() == pytest.approx([wanted[concept] for concept in own], rel=1e-4)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 10_000),
    st.lists(st.integers(0, len(NAMES) - 1), min_size=1, unique=True),
    st.floats(0.001, 1),
    st.floats(0.01, 0.99),
)
def test_posterior_is_finite_and_leaves_the_unmatched_slot_its_share(
    seed: int, own: list[int], temperature: float, trust: float
) -> None:
    posterior = CaptionMatcher(CaptionConfig(caption_prior=trust), NAMES).posterior(
        evidence(own=tuple(own), seed=seed, temperature=temperature)
    )
    assert bool(posterior.isfinite().all())
    assert bool((posterior >= 0).all())
    assert bool((posterior.sum(1) <= 1 + 1e-5).all())


def test_a_pool_of_nothing_but_own_concepts_has_an_empty_unmatched_slot() -> None:
    posterior = CaptionMatcher(CaptionConfig(), NAMES).posterior(evidence(own=tuple(range(len(NAMES)))))
    torch.testing.assert_close(posterior.sum(1), torch.ones(9))


def test_relatives_of_an_own_concept_are_neither_own_nor_others() -> None:
    matcher, case = CaptionMatcher(CaptionConfig(), NAMES), evidence(own=(1,))
    louder = case.similarity.clone()
    louder[:, [2, 3]] = 0.9  # red umbrella, small red umbrella
    changed = replace(case, similarity=louder)
    torch.testing.assert_close(matcher.posterior(changed), matcher.posterior(case))
    louder[:, 0] = 0.9  # cup
    assert bool((matcher.posterior(changed) < matcher.posterior(case)).all())


@pytest.mark.parametrize("seed", range(6))
def test_caption_keeps_sure_regions_and_every_phrases_best_one(seed: int) -> None:
    case = evidence(seed=seed, own=(1, 4, 6))
    config = CaptionConfig(caption_prior=0.5, min_probability=0.9, min_phrase=0.05, min_objectness=0.2, k=2)
    match = CaptionMatcher(config, NAMES)(case)
    objects = [row for row in range(9) if case.objectness[row] >= 0.2]
    posterior = {row: naive_posterior(case, row, 0.5) for row in objects}
    wanted = {row for row in objects if max(posterior[row].values()) >= 0.9}
    for phrase in (1, 4, 6):
        best = max(objects, key=lambda row, phrase=phrase: posterior[row][phrase])
        if posterior[best][phrase] >= 0.05:
            wanted.add(best)
    assert match.indices.tolist() == sorted(wanted)
    for row, found in as_rows(match).items():
        best_two = sorted(posterior[row], key=lambda concept, row=row: -posterior[row][concept])[:2]
        assert [concept for concept, _ in found] == best_two
    assert bool(match.from_caption.all())


def test_a_phrases_best_region_below_min_phrase_is_left_out() -> None:
    config = CaptionConfig(caption_prior=0.01, min_probability=1.0, min_phrase=0.9)
    assert not len(CaptionMatcher(config, NAMES)(evidence()).indices)


@pytest.mark.parametrize("case", [evidence(own=()), evidence(n=0)])
def test_nothing_to_match_keeps_nothing(case: MatchInputs) -> None:
    for matcher in (CaptionMatcher(CaptionConfig(), NAMES), HybridMatcher(HybridConfig(), NAMES)):
        kept = matcher(replace(case, similarity=case.similarity * 0, temperature=1.0))
        assert kept.indices.tolist() == []
        assert kept.concept_ids.shape[0] == kept.concept_probs.shape[0] == len(kept.from_caption) == 0


@pytest.mark.parametrize("seed", range(6))
def test_hybrid_is_caption_then_pool(seed: int) -> None:
    case = evidence(seed=seed)
    config = HybridConfig(caption_prior=0.3, min_probability=0.6, min_pool_probability=0.3, k=3)
    hybrid = as_rows(HybridMatcher(config, NAMES)(case))
    caption = as_rows(CaptionMatcher(config, NAMES)(case))
    pool = as_rows(PoolMatcher(PoolConfig(0.3, keep_all_if_none=False, k=3), NAMES)(case))
    assert list(hybrid) == sorted({*caption, *pool})
    for row, found in hybrid.items():
        first = caption.get(row, pool.get(row))
        assert first is not None
        assert found[: len(first)] == first
        assert all(prob == 0 for _, prob in found[len(first) :])


def test_families_end_with_the_most_general_name() -> None:
    assert [NAMES[root] for root in concept_groups(NAMES)] == [family(name) for name in NAMES]
    assert concept_groups(["fire hydrant", "fire"]).tolist() == [0, 1]


@pytest.mark.parametrize("kind", [PoolMatcher, CaptionMatcher, HybridMatcher])
def test_every_matcher_has_a_gate_for_objectness(kind: type) -> None:
    case = evidence()
    options = {"min_probability": 0.0, "min_objectness": 0.5}
    if kind is HybridMatcher:
        options["min_pool_probability"] = 0.0
    config = {PoolMatcher: PoolConfig, CaptionMatcher: CaptionConfig, HybridMatcher: HybridConfig}[kind]
    kept = kind(config(**options), NAMES)(case).indices.tolist()
    assert kept == [row for row in range(9) if case.objectness[row] >= 0.5]
    assert kept


def test_a_region_unlike_every_own_concept_stays_unmatched() -> None:
    case = evidence()
    everything = CaptionConfig(min_probability=0.0, min_phrase=0.0)
    assert CaptionMatcher(everything, NAMES)(case).indices.tolist() == list(range(9))
    best = case.similarity[:, case.caption_concepts].amax(1)
    level = float(best.median())
    some = CaptionConfig(min_probability=0.0, min_phrase=0.0, min_similarity=level)
    kept = CaptionMatcher(some, NAMES)(case).indices.tolist()
    assert kept == [row for row in range(9) if best[row] >= level]
    assert len(kept) == 5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: PoolConfig(min_probability=1.5), r"matcher\.min_probability must be in 0…1, found 1\.5"),
        (lambda: CaptionConfig(min_similarity=-2), r"matcher\.min_similarity must be in -1…1"),
        (lambda: HybridConfig(min_pool_probability=-0.1), r"matcher\.min_pool_probability must be in 0…1"),
        (lambda: HybridConfig(k=0), r"matcher\.k must be at least 1"),
    ],
)
def test_thresholds_that_nothing_can_meet_are_refused(config: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config()


@pytest.mark.parametrize("name", sorted(plugins.found(GROUP)))
def test_help_tells_what_every_threshold_of_a_matcher_means(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main_regionclip(["mine", "--help-all", f"matcher.name={name}"]) == 0
    text = capsys.readouterr().out
    told = " ".join(text.split())
    for key, field, _ in fields_of(plugins.schema_of(plugins.load(GROUP, name))):
        assert f"  matcher.{key} (" in text
        assert " ".join(field.metadata["meaning"].split()) in told
        assert len(field.metadata["meaning"]) > 15


def test_trust_outside_its_range_is_refused() -> None:
    with pytest.raises(InputError, match=r"matcher\.caption_prior"):
        CaptionConfig(caption_prior=1.0)


def naive_exclusive(case: MatchInputs, config: ExclusiveConfig) -> set[int]:
    """One region after another, best first: is a better one of its concept in its way?"""
    own = case.caption_concepts.tolist()
    found = []
    for row in range(len(case.objectness)):
        posterior = naive_posterior(case, row, config.caption_prior)
        concept = max(own, key=lambda one: posterior[one])
        found.append((posterior[concept] * float(case.objectness[row]), row, concept))
    kept: list[tuple[int, int]] = []
    for value, row, concept in sorted(found, key=lambda entry: -entry[0]):
        rivals = [other for other, its in kept if its == concept]
        least = config.min_score if rivals else config.min_first
        if value >= least and not any(shared(case, row, other) > config.overlap for other in rivals):
            kept.append((row, concept))
    return {row for row, _ in kept}


def shared(case: MatchInputs, a: int, b: int) -> float:
    """The share of the smaller box that is in the other."""
    first, second = case.boxes[a].tolist(), case.boxes[b].tolist()
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (first, second)]
    return max(width, 0) * max(height, 0) / min(areas)


@given(st.integers(0, 10_000), st.sampled_from([(1,), (1, 4), (0, 2, 5)]))
@settings(deadline=None, max_examples=40)
def test_an_exclusive_region_has_no_better_one_of_its_concept_beside_it(
    seed: int, own: tuple[int, ...]
) -> None:
    config = ExclusiveConfig(min_first=0.05, min_score=0.2)
    case = evidence(12, own, seed)
    match = ExclusiveMatcher(config, NAMES)(case)
    assert set(match.indices.tolist()) == naive_exclusive(case, config)
    assert match.indices.tolist() == sorted(match.indices.tolist())
    assert bool(torch.isin(match.concept_ids[:, 0], case.caption_concepts).all())
    assert bool(match.from_caption.all())


def test_without_own_concepts_an_exclusive_match_is_empty() -> None:
    assert not len(ExclusiveMatcher(ExclusiveConfig(), NAMES)(evidence(own=())).indices)


def test_an_overlap_that_is_no_share_is_refused() -> None:
    with pytest.raises(InputError, match=r"matcher.overlap must be in 0…1, found 1.5"):
        ExclusiveConfig(overlap=1.5)
