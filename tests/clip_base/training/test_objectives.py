from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from clip_base.data.batch import ImageBatch, ImageTextBatch
from clip_base.jobs.config import build_plugin, resolve
from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig
from clip_base.models.predictor import OBJECTIVES
from clip_base.runtime.errors import InputError
from clip_base.training.losses import PairEmbeddings
from clip_base.training.pretrain import PretrainConfig, make_model, make_task

GROUPS = torch.tensor([0, 1, 0, 2, 3, 1, 4, 5])
SPECS: list[dict[str, Any]] = [
    {"name": "contrastive"},
    {"name": "chunked", "rows": 3},
    {"name": "sigmoid"},
    {"name": "sigmoid", "rows": 3},
]


def embeddings(size: int = 8, width: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Returns leaves: images and texts of unit length, float64, and a scale."""
    generator = torch.Generator().manual_seed(0)
    both = F.normalize(torch.randn(2, size, width, dtype=torch.float64, generator=generator), dim=-1)
    images, texts = (part.clone().requires_grad_() for part in both)
    return images, texts, torch.tensor(7.0, dtype=torch.float64, requires_grad=True)


def objective(spec: dict[str, Any]) -> Any:
    return build_plugin(OBJECTIVES, spec).double()


def whole(images: Tensor, texts: Tensor, groups: Tensor | None = None) -> PairEmbeddings:
    return PairEmbeddings(images, texts, images, texts, 0, groups)


@pytest.mark.parametrize("rows", [1, 3, 8, 100])
def test_the_chunked_loss_has_the_plain_ones_value_and_gradients(rows: int) -> None:
    plain, chunked = embeddings(), embeddings()
    expected = objective({"name": "contrastive"})(whole(*plain[:2]), plain[2])
    actual = objective({"name": "chunked", "rows": rows})(whole(*chunked[:2]), chunked[2])
    assert actual.item() == pytest.approx(expected.item(), rel=1e-12)
    (3 * expected).backward()
    (3 * actual).backward()
    for one, other in zip(chunked, plain, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-12)


class Largest(TorchDispatchMode):
    """Remembers the largest number of elements that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return out


@pytest.mark.parametrize(("name", "grouped"), [("chunked", False), ("sigmoid", False), ("sigmoid", True)])
def test_the_matrix_of_similarities_never_exists_as_a_whole(name: str, grouped: bool) -> None:
    images, texts, scale = embeddings(64)
    groups = torch.arange(64) // 2 if grouped else None
    with Largest() as largest:
        objective({"name": name, "rows": 4})(whole(images, texts, groups), scale).backward()
    assert largest.elements == max(4 * 64, images.numel())


@pytest.mark.parametrize(("spec", "groups"), [*((spec, None) for spec in SPECS), (SPECS[-1], GROUPS)])
def test_the_mean_of_two_processes_rows_is_the_loss_of_all(
    spec: dict[str, Any], groups: Tensor | None
) -> None:
    images, texts, scale = embeddings()
    loss = objective(spec)
    expected = loss(whole(images, texts, groups), scale)
    expected_gradients = torch.autograd.grad(expected, (images, texts, scale))
    shares = [
        loss(PairEmbeddings(images[part], texts[part], images, texts, part.start, groups), scale)
        for part in (slice(0, 4), slice(4, 8))
    ]
    actual = sum(shares) / 2
    assert actual.item() == pytest.approx(expected.item(), rel=1e-12)
    gradients = torch.autograd.grad(actual, (images, texts, scale))
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_the_sigmoid_loss_is_its_definition(groups: Tensor | None) -> None:
    images, texts, _ = embeddings()
    scale, bias, names = 10.0, -10.0, list(range(8)) if groups is None else groups.tolist()
    expected = 0.0
    for image, own in zip(images.tolist(), names, strict=True):
        for text, other in zip(texts.tolist(), names, strict=True):
            label = 1 if own == other else -1
            cosine = sum(a * b for a, b in zip(image, text, strict=True))
            expected += math.log(1 + math.exp(-label * (scale * cosine + bias))) / 8
    loss = objective({"name": "sigmoid"})
    actual = loss(whole(images, texts, groups), torch.tensor(scale, dtype=torch.float64))
    assert actual.item() == pytest.approx(expected, rel=1e-10)


def test_the_sigmoid_losss_bias_is_learned() -> None:
    images, texts, scale = embeddings()
    loss = objective({"name": "sigmoid", "rows": 3})
    assert torch.autograd.gradcheck(lambda bias: _with_bias(loss, bias, images, texts, scale), loss.bias)


def _with_bias(loss: Any, bias: Tensor, images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    result: Tensor = torch.func.functional_call(loss, {"bias": bias}, (whole(images, texts), scale))
    return result


@pytest.mark.parametrize("spec", SPECS[1:])
def test_a_loss_without_gradients_is_the_same_number(spec: dict[str, Any]) -> None:
    images, texts, scale = embeddings()
    loss = objective(spec)
    expected = loss(whole(images, texts), scale).item()
    with torch.no_grad():
        assert loss(whole(images, texts), scale).item() == expected


def tiny(**changes: Any) -> PretrainConfig:
    vision = VisionConfig(kind="vit", layers=[1], width=16, patch=16, resolution=32, head_width=16)
    sizes = CLIPConfig(8, vision, TextConfig(width=16, heads=1, layers=1, context_length=8))
    return replace(PretrainConfig(out="x", tower=sizes), **changes)


def test_the_sigmoid_loss_begins_at_its_published_values() -> None:
    config = tiny(objective={"name": "sigmoid"})
    task = make_task(config, make_model(config))
    assert task.log_scalars() == pytest.approx({"logit_scale": 10.0, "bias": -10.0})
    plain = make_task(tiny(), make_model(tiny()))
    assert plain.log_scalars() == pytest.approx({"logit_scale": 1 / 0.07})
    started = tiny(objective={"name": "sigmoid"}, init="weights")
    assert make_task(started, plain.model).log_scalars()["logit_scale"] == pytest.approx(1 / 0.07)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ({"name": "sigmoid"}, True),
        ({"name": "sigmoid", "merge_equal": False}, False),
        ({"name": "contrastive"}, False),
    ],
)
def test_only_an_objective_that_asks_is_told_which_captions_are_equal(
    spec: dict[str, Any], told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor | None] = []
    task = make_task(tiny(objective=spec), make_model(tiny()))
    monkeypatch.setattr(
        task.objective, "forward", lambda pairs, scale: seen.append(pairs.groups) or scale.sum()
    )
    tokens = torch.tensor([[1, 2, 3, 0], [1, 4, 3, 0], [1, 2, 3, 0]])
    task(ImageTextBatch(ImageBatch.whole(torch.zeros(3, 3, 32, 32)), tokens))
    (groups,) = seen
    assert (None if groups is None else groups.tolist()) == ([0, 1, 0] if told else None)


def test_objectives_are_chosen_and_checked_by_the_config() -> None:
    needed = ["out=x", "source.captions=c", "source.images=i"]
    config = resolve(PretrainConfig, None, [*needed, "objective.name=chunked", "objective.rows=7"])
    assert config.objective == {"name": "chunked", "rows": 7}
    for wrong, message in (
        (["objective.name=sigmoyd"], "did you mean 'sigmoid'"),
        (["objective.rows=3"], "there is no option"),
        (["objective.name=chunked", "objective.rows=0"], "objective.rows must be at least 1, found 0"),
        (["objective.name=sigmoid", "objective.scale=0"], "objective.scale must be above 0"),
    ):
        with pytest.raises(InputError, match=message):
            resolve(PretrainConfig, None, [*needed, *wrong])
