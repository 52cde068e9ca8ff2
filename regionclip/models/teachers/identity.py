"""What tells teachers apart: the content of their files, or the name of a model that its package fetches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clip_base.jobs.config import Plugin
from clip_base.runtime.errors import InputError
from clip_base.storage.hashing import content_hash
from clip_base.weights.load import find
from regionclip.concepts.vocabulary import Vocabulary, weights_hash
from regionclip.models.teachers.base import CLIP_BACKEND, TeacherModel

DEFAULT: Plugin = {"name": CLIP_BACKEND}  # of what was mined before there were others


def is_own(backend: Plugin) -> bool:
    """Whether a teacher's weights are a CLIP that this package reads."""
    return str(backend["name"]) == CLIP_BACKEND


def source_of(backend: Plugin, weights: str) -> Path | str:
    """Returns the file or folder that a teacher is read from, or what its package calls it."""
    if is_own(backend):
        return find(weights)
    path = Path(weights)
    told = ", ".join(f"{key}={value}" for key, value in backend.items() if key != "name" and value)
    return path if path.exists() else f"{backend['name']}: {weights}" + (f" ({told})" if told else "")


def identity_of(backend: Plugin, weights: str) -> str:
    """Returns the hash of a teacher's files, or what its package calls it: a manifest's `teacher`."""
    source = source_of(backend, weights)
    return content_hash(source) if isinstance(source, Path) else source


def require_mined_by(weights: str, manifest: dict[str, Any]) -> Plugin:
    """Returns the backend of the teacher that mined a folder.

    Raises:
        InputError: `weights` are not those that mined.
    """
    backend: Plugin = manifest["config"].get("backend", DEFAULT)
    if identity_of(backend, weights) != manifest["teacher"]:
        raise InputError(
            f"teacher={weights} is not the file used for mining, {manifest['config']['weights']} "
            "unchanged; give that file, or leave teacher= empty"
        )
    return backend


def require_same_teacher(
    teacher: TeacherModel, backend: Plugin, weights: str, vocabulary: Vocabulary
) -> None:
    """Checks that a model which its package fetched is the one whose text tower embedded the vocabulary.

    Files are known by their content; what a name stands for may differ from machine to machine.

    Raises:
        InputError: the weights differ.
    """
    if is_own(backend) or isinstance(source_of(backend, weights), Path):
        return
    if weights_hash(teacher) != vocabulary.provenance.get("weights"):
        raise InputError(
            f"weights={weights} are not the ones here that embedded the concepts; give the same version "
            "everywhere, or a folder of files"
        )
