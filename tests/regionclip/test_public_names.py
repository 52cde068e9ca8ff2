"""What the packages offer to importers is typed, and documented with shapes and errors."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import clip_base
import regionclip

OURS = ("clip_base", "regionclip")


def public_members(package: ModuleType) -> Iterator[tuple[str, Any]]:
    """Yields each public name, class and method, and what it stands for."""
    for name in package.__all__:
        value = getattr(package, name)
        yield f"{package.__name__}.{name}", value
        if not inspect.isclass(value):
            continue
        for owner in value.__mro__:
            if not owner.__module__.startswith(OURS):
                continue
            for member, content in vars(owner).items():
                if not member.startswith("_") and (callable(content) or is_wrapped(content)):
                    yield f"{package.__name__}.{name}.{member}", content


def is_wrapped(content: object) -> bool:
    return isinstance(content, property | classmethod | staticmethod)


def function_of(value: Any) -> Callable[..., Any]:
    if isinstance(value, property):
        return value.fget  # type: ignore[return-value]
    if inspect.isclass(value):
        return value.__init__  # type: ignore[misc, no-any-return]
    return value.__func__ if isinstance(value, classmethod | staticmethod) else value  # type: ignore[no-any-return]


MEMBERS = [member for package in (clip_base, regionclip) for member in public_members(package)]
each_member = pytest.mark.parametrize(
    "value", [value for _, value in MEMBERS], ids=[name for name, _ in MEMBERS]
)


def arguments(value: Any) -> list[inspect.Parameter]:
    if inspect.isclass(value) and (issubclass(value, Exception) or getattr(value, "_is_protocol", False)):
        return []  # made by Python, or by whoever implements it
    parameters = list(inspect.signature(function_of(value)).parameters.values())
    return [parameter for parameter in parameters if parameter.name not in ("self", "cls")]


def test_the_walk_meets_functions_classes_methods_and_properties() -> None:
    names = {name for name, _ in MEMBERS}
    assert {
        "clip_base.load",
        "regionclip.Predictor",
        "regionclip.Predictor.detect",
        "regionclip.Predictor.names",
        "regionclip.Detections.from_coco",
    } <= names


@each_member
def test_it_is_documented(value: Any) -> None:
    says = value.__doc__ or ""
    assert says.strip()
    if inspect.isclass(value):
        assert not says.startswith(f"{value.__name__}(")  # what a dataclass writes when nobody else does


@each_member
def test_it_is_typed(value: Any) -> None:
    if inspect.isclass(value) and not arguments(value):
        return
    untyped = [one.name for one in arguments(value) if one.annotation is inspect.Parameter.empty]
    assert not untyped
    assert inspect.signature(function_of(value)).return_annotation is not inspect.Signature.empty


@each_member
def test_its_arguments_are_explained(value: Any) -> None:
    says = value.__doc__ or ""
    assert not [one.name for one in arguments(value) if not re.search(rf"\b{one.name}\b", says)]


@each_member
def test_its_tensors_have_shapes(value: Any) -> None:
    signature = inspect.signature(function_of(value))
    types = [str(one.annotation) for one in arguments(value)] + [str(signature.return_annotation)]
    if any(re.search(r"\bTensor\b", kind) for kind in types):
        assert re.search(r"\[[A-Z\d]", value.__doc__ or "")


@each_member
def test_what_it_raises_is_said(value: Any) -> None:
    if not inspect.isclass(value) and re.search(r"^\s+raise ", inspect.getsource(function_of(value)), re.M):
        assert "Error" in (value.__doc__ or "")


@pytest.mark.parametrize("package", [clip_base, regionclip])
def test_type_checkers_are_told_that_it_is_typed(package: ModuleType) -> None:
    assert (Path(str(package.__file__)).parent / "py.typed").exists()


@pytest.mark.parametrize("package", [clip_base, regionclip])
def test_a_name_that_it_does_not_have_is_an_attribute_error(package: ModuleType) -> None:
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'nothing'"):
        package.nothing  # noqa: B018
