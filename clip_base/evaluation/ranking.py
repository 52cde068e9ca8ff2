"""Ranks of correct answers: the one rule for every top-k, R@k and linear probe.

A wrong answer that scores the same as the right one counts as before it: a model whose embeddings are all
alike knows nothing, and two classes of one name cannot be told apart.
"""

# Q queries, A answers, D embedding size, N images, C classes
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_base.runtime.errors import InputError
from clip_base.weights.native import not_finite

ROWS = 1024  # queries that are scored at once


def ranks_of_best(scores: Tensor, right: Tensor) -> Tensor:
    """Returns [Q] int64: how many wrong answers score at least as much as the best right one.

    Args:
        scores: [Q, A].
        right: [Q, A] bool; a row without a right answer gets the number of all answers.

    Raises:
        ValueError: a score is NaN, which is smaller than nothing and would count as right.
    """
    if bool(scores.isnan().any()):
        raise ValueError("scores hold NaN")
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)  # [Q, 1]
    return ((scores >= best) & ~right).sum(1)


def ranks_of_classes(features: Tensor, directions: Tensor, labels: Tensor) -> Tensor:
    """Returns [N] int64: how many other classes score at least as much as the true one.

    Args:
        features: [N, D], of any length.
        directions: [C, D], unit length.
        labels: [N] int64, the true classes.
    """
    answers, ranks = Answers(directions), [torch.empty(0, dtype=torch.int64, device=labels.device)]
    for start in range(0, len(features), ROWS):
        scores = answers.scores(F.normalize(features[start : start + ROWS].float(), dim=-1))  # [b, C]
        right = F.one_hot(labels[start : start + ROWS], len(directions)).bool()
        ranks.append(ranks_of_best(scores, right))
    return torch.cat(ranks)


class Answers:
    """Embeddings that queries are compared with; equal ones get equal scores.

    A matrix product may round equal columns differently, by their place, which would decide between them by
    chance. So each distinct embedding is multiplied once.

    Args:
        embeddings: [A, D].
    """

    def __init__(self, embeddings: Tensor) -> None:
        distinct, place = torch.unique(embeddings.float(), dim=0, return_inverse=True)
        self._columns: Tensor = distinct.T  # [D, distinct]
        self._place: Tensor = place  # [A]

    def scores(self, queries: Tensor) -> Tensor:
        """Returns [Q, A] float32 inner products of [Q, D] queries with all answers."""
        scores: Tensor = queries.float() @ self._columns
        return scores[:, self._place]


def require_finite(features: Tensor, what: str, model: nn.Module, source: object) -> None:
    """Raises an InputError when embeddings hold NaN or infinity.

    Args:
        features: any shape.
        what: what was embedded, for the message.
        model: what embedded it; the message names its first weight that is not finite, if there is one.
        source: the weights' file, for the message.
    """
    if bool(features.isfinite().all()):
        return
    bad = not_finite(model.state_dict())
    if bad:
        raise InputError(
            f"{source}: the embeddings of {what} are not finite, since {bad}; train or copy it again"
        )
    raise InputError(
        f"{source}: the embeddings of {what} are not finite though every weight is: numbers overflow their "
        "type; compute in fp32"
    )
