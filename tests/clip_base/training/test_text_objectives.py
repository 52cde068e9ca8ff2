from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clip_base.models.clip import CLIP, set_checkpointing
from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig
from clip_base.models.predictor import (
    FIRST,
    MASK,
    PADDING,
    UNKNOWN,
    TextObjective,
    TokenVocabulary,
    frequent_tokens,
)
from clip_base.models.tokenizer import END, START, Tokenizer
from clip_base.runtime import distributed
from clip_base.runtime.errors import InputError
from clip_base.weights.predictors import build_text_objective

CAPTIONS = ["a red dog", "a dog and a cat", "two birds"]
SPECS: list[dict[str, Any]] = [
    {"name": "bag_of_words"},
    {"name": "bag_of_words", "loss": "sigmoid"},
    {"name": "captioning"},
    {"name": "masked_lm"},
]
SIZES = CLIPConfig(
    16,
    VisionConfig(kind="vit", layers=[1], width=32, patch=16, resolution=32, head_width=16),
    TextConfig(width=32, heads=2, layers=2, context_length=10),
)
TOKENIZE = Tokenizer(10)


def objective(spec: dict[str, Any], captions: list[str] = CAPTIONS) -> TextObjective:
    torch.manual_seed(0)
    made = build_text_objective(spec, SIZES, CLIP(SIZES).visual, frequent_tokens(captions, 10))
    for parameter in made.parameters():  # far from the small initial values, so that texts differ
        torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


def images(made: TextObjective, count: int = 3) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(count, 16) if made.reads == "embedding" else torch.randn(count, 5, 32)


def test_a_vocabulary_has_the_most_frequent_tokens() -> None:
    ids = frequent_tokens(CAPTIONS, 10)
    words = ["a", "and", "birds", "cat", "dog", "red", "two"]
    assert ids.tolist() == sorted([*(TOKENIZE.encode(word)[0] for word in words), START, END])
    a, dog = TOKENIZE.encode("a dog")
    assert frequent_tokens(CAPTIONS, 10, limit=4).tolist() == sorted([a, dog, START, END])
    with pytest.raises(InputError, match="no captions"):
        frequent_tokens([], 10)


def test_texts_become_rows_with_padding_and_unknown_words() -> None:
    vocabulary = TokenVocabulary(frequent_tokens(CAPTIONS, 10, limit=4))
    rows = vocabulary(TOKENIZE(["a dog", "a green dog here"]))
    ids = vocabulary.ids.tolist()
    a, dog, start, end = (FIRST + ids.index(token) for token in (*TOKENIZE.encode("a dog"), START, END))
    first = [start, a, dog, end, PADDING, PADDING]
    assert rows.tolist() == [first, [start, a, UNKNOWN, dog, UNKNOWN, end]]


@pytest.mark.parametrize("spec", SPECS)
def test_the_likelihood_of_a_text_does_not_depend_on_the_others(spec: dict[str, Any]) -> None:
    made, tokens = objective(spec), TOKENIZE([*CAPTIONS, "cat"])
    with torch.no_grad():
        together = made.log_likelihood(images(made), tokens)
        alone = torch.cat(
            [
                torch.cat([made.log_likelihood(image[None], text[None]) for text in tokens], 1)
                for image in images(made)
            ]
        )
    assert together.shape == (3, 4)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_a_bag_of_words_sums_the_log_probabilities_of_distinct_words() -> None:
    tokens = TOKENIZE(["a dog and a cat", "cat dog and a", "two"])
    for spec, known in (
        (SPECS[0], lambda logits: logits.log_softmax(1)),
        (SPECS[1], F.logsigmoid),
    ):
        made = objective(spec)
        read = images(made)
        vocabulary, classifier = made.vocabulary, made.classifier
        probabilities = known(classifier(read))
        ids = vocabulary.ids.tolist()
        words = [FIRST + ids.index(token) for token in TOKENIZE.encode("a dog and cat")]
        found = made.log_likelihood(read, tokens)
        torch.testing.assert_close(found[:, 0], probabilities[:, words].sum(1))
        torch.testing.assert_close(found[:, 1], found[:, 0])


def test_the_bag_of_words_losses_are_their_definitions() -> None:
    tokens = TOKENIZE(["a dog and a cat", "two"])
    softmax, sigmoid = objective(SPECS[0]), objective(SPECS[1])
    read = images(softmax, 2)
    ids = softmax.vocabulary.ids.tolist()
    bags = [
        {FIRST + ids.index(token) for token in TOKENIZE.encode(text)} for text in ("a dog and cat", "two")
    ]
    logits = softmax.classifier(read)
    expected = -sum(logits[i].log_softmax(0)[list(bag)].mean() for i, bag in enumerate(bags)) / 2
    torch.testing.assert_close(softmax(read, tokens), expected)
    logits, total = sigmoid.classifier(read), 0.0
    for i, bag in enumerate(bags):
        for row in range(sigmoid.vocabulary.rows):
            sign = 1 if row in bag else -1
            total += math.log1p(math.exp(-sign * float(logits[i, row].detach())))
    assert float(sigmoid(read, tokens).detach()) == pytest.approx(total / 2, rel=1e-4)


def test_captioning_scores_each_token_by_those_before_it() -> None:
    made = objective(SPECS[2])
    read, tokens = images(made, 1), TOKENIZE(["a red dog"])
    rows = made.vocabulary(tokens)
    expected = 0.0
    for place in range(1, rows.shape[1]):  # only what comes before is given at all
        before = rows[:, :place]
        logits = made.decoder(read, before, before == PADDING)
        expected += float(logits[0, -1].log_softmax(0)[rows[0, place]].detach())
    found = made.log_likelihood(read, tokens)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-4)
    mean = -expected / (rows.shape[1] - 1)
    assert float(made(read, tokens).detach()) == pytest.approx(mean, rel=1e-4)


def test_a_masked_language_model_hides_each_word_alone() -> None:
    made = objective(SPECS[3])
    read, tokens = images(made, 1), TOKENIZE(["a red dog"])
    rows = made.vocabulary(tokens)
    expected = 0.0
    for place in (1, 2, 3):
        hidden = rows.clone()
        hidden[0, place] = MASK
        logits = made.decoder(read, hidden, hidden == PADDING)
        expected += float(logits[0, place].log_softmax(0)[rows[0, place]].detach())
    assert float(made.log_likelihood(read, tokens).detach()) == pytest.approx(expected, rel=1e-4)


def test_masking_hides_words_only_and_one_at_least() -> None:
    made = objective({"name": "masked_lm", "masked": 0.3}, ["a b c d e f g"])
    rows = made.vocabulary(TOKENIZE(["a b c d e f g", "a", ""] * 200))
    hidden = made._draw(rows, 10)
    words = torch.tensor([7, 1, 0] * 200)
    assert hidden[:, 0].sum() == 0
    counts = hidden.sum(1)
    assert bool((counts >= (words > 0)).all())
    assert bool((counts <= words).all())
    # One of seven at least: (0.3 · 7 + 0.7⁷) / 7 of the words on average.
    assert float(counts[::3].float().mean()) == pytest.approx(2.1 + 0.7**7, abs=0.35)
    shares = hidden[::3, 1:8].float().mean(0)
    assert float(shares.min()) > 0.2


@pytest.mark.parametrize("spec", SPECS)
def test_the_mean_of_two_processes_losses_is_the_loss_of_all(
    spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = objective(spec).train()
    tokens, read = TOKENIZE([*CAPTIONS, "cat"]), images(made, 4)
    torch.manual_seed(3)
    whole = made(read, tokens)
    counts: list[Tensor] = []
    halves = (slice(0, 2), slice(2, 4))
    for part in halves:  # what each process would count
        monkeypatch.setattr(distributed, "world", lambda: 2)
        monkeypatch.setattr(distributed, "rank", lambda part=part: part.start // 2)
        monkeypatch.setattr(distributed, "mean", lambda count: counts.append(count) or count)
        torch.manual_seed(3)
        made(read[part], tokens[part])
    monkeypatch.setattr(distributed, "mean", lambda count: sum(counts) / 2)
    losses = []
    for part in halves:
        monkeypatch.setattr(distributed, "rank", lambda part=part: part.start // 2)
        torch.manual_seed(3)
        losses.append(made(read[part], tokens[part]))
    torch.testing.assert_close(sum(losses) / 2, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["captioning", "masked_lm"])
def test_recomputing_blocks_changes_no_gradient(name: str) -> None:
    gradients = []
    for enabled in (False, True):
        made = objective({"name": name}).train()
        set_checkpointing(made, enabled)
        torch.manual_seed(5)
        made(images(made), TOKENIZE(CAPTIONS)).backward()
        gradients.append([parameter.grad for parameter in made.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_decoder_needs_the_sizes_of_a_transformer() -> None:
    sizes = CLIPConfig(16, SIZES.vision, TextConfig(width=32, context_length=10, kind="bow"))
    with pytest.raises(InputError, match=r"found text.kind=bow; omit text.kind"):
        build_text_objective({"name": "captioning"}, sizes, CLIP(sizes).visual, frequent_tokens(CAPTIONS, 10))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "captioning", "weight": 0.0}, "objective.weight must be above 0"),
        ({"name": "captioning", "words": -1}, "objective.words must be at least 0"),
        ({"name": "masked_lm", "masked": 0.0}, r"objective.masked must be in \(0, 1\]"),
        ({"name": "bag_of_words", "loss": "hinge"}, "objective.loss must be one of"),
        ({"name": "captioning", "masked": 0.5}, "there is no option 'masked'"),
    ],
)
def test_wrong_options_are_refused(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        objective(spec)
