"""The job `interpolate`: weights between two models (WiSE-FT, arXiv 2109.01903)."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from clip_base.jobs.config import REQUIRED, option
from clip_base.jobs.everyday import everyday
from clip_base.runtime.errors import InputError
from clip_base.weights.load import find, load_clip, local_copy
from clip_base.weights.native import FORMAT as CLIP
from clip_base.weights.native import TEXT_TOWER, read_weights, write_weights
from clip_base.weights.reading import read_notes
from regionclip.checkpoints.load import FORMAT as DETECTOR
from regionclip.models.region_heads import KEY

PREFIX = "clip."  # of a CLIP's weights in a detector's file
STUDENT = "student."  # of the frozen student's there


@everyday(
    "interpolate first=clip.safetensors second=regionclip.safetensors alpha=0.5 out=between.safetensors",
    input="first second",
    output="out",
    quality="alpha part",
)
@dataclass
class InterpolateConfig:
    """Options of weight interpolation."""

    first: str = option(REQUIRED, "weights at alpha 0: a CLIP, or a detector")
    second: str = option(REQUIRED, "weights at alpha 1: a CLIP, or a detector; of the same sizes")
    alpha: list[float] = option([0.5], "weights of the second model, each in [0, 1]; several give a curve")
    out: str = option(
        REQUIRED, "file to write; with several alphas a folder for alpha-0.25.safetensors and so on"
    )
    part: str = option(
        "all", "what to write of a detector: all of it, or only its CLIP", choices=("all", "clip")
    )

    def __post_init__(self) -> None:
        if not self.alpha or not all(0 <= alpha <= 1 for alpha in self.alpha):
            raise InputError(f"alpha must be one or more numbers in [0, 1], found {self.alpha}")
        if len(self.alpha) == 1 and not self.out.endswith(".safetensors"):
            raise InputError(f"out={self.out}: weights are written as .safetensors; give such a name")


@dataclass(frozen=True)
class Weights:
    """What a file holds.

    Attributes:
        path: the file.
        tensors: by the names of a detector, a CLIP's own behind `PREFIX`.
        clip: sizes of the CLIP, JSON.
        metadata: the file's; a CLIP's has format, sizes and what it says of its region head.
    """

    path: str
    tensors: dict[str, Tensor]
    clip: str
    metadata: dict[str, str]

    @property
    def is_detector(self) -> bool:
        """Whether there is more than a CLIP."""
        return self.metadata["format"] == DETECTOR


def read(path: str) -> Weights:
    """Reads a detector, or a CLIP in any known format."""
    path = local_copy(path)
    if path.endswith(".safetensors"):
        tensors, metadata = read_weights(path)
        if metadata.get("format") == DETECTOR:
            return Weights(path, tensors, metadata["clip"], metadata)
    model = load_clip(path)
    sizes = json.dumps(dataclasses.asdict(model.config))
    tensors = {f"{PREFIX}{name}": value for name, value in model.state_dict().items()}
    return Weights(path, tensors, sizes, {**read_notes(find(path)), "format": CLIP, "config": sizes})


def mix(first: Tensor, second: Tensor, alpha: float) -> Tensor:
    """Returns (1 − alpha) · first + alpha · second, rounded where both count something."""
    mixed = (1 - alpha) * first.double() + alpha * second.double()
    return (mixed if second.is_floating_point() else mixed.round()).to(second.dtype)


def between(first: Weights, second: Weights, alpha: float) -> dict[str, Tensor]:
    """Returns the mixed tensors; what only a detector has beside a CLIP is as it is there, as is a student.

    Raises:
        InputError: the models have other sizes, or tensors that do not fit each other.
    """
    if json.loads(first.clip) != json.loads(second.clip):
        raise InputError(
            f"{first.path} and {second.path} are CLIPs of different sizes ({first.clip}; {second.clip}); "
            "only weights of the same architecture can be interpolated"
        )
    one, other = (_students(weights) for weights in (first, second))
    if first.is_detector and second.is_detector and not _equal(one, other):
        raise InputError(
            f"{first.path} and {second.path} keep different students, or one keeps none; a mix of two would "
            "be none that a detector was trained from. Give detectors of one student, or part=clip"
        )
    shared = (first.tensors.keys() & second.tensors.keys()) - one.keys()
    alone = sorted((first.tensors.keys() ^ second.tensors.keys()) - one.keys() - other.keys())
    if first.is_detector != second.is_detector:
        alone = [name for name in alone if name.startswith(PREFIX)]
    shapes = {
        name: (list(first.tensors[name].shape), list(second.tensors[name].shape)) for name in sorted(shared)
    }
    unlike = [f"{name} {one} and {other}" for name, (one, other) in shapes.items() if one != other]
    if alone or unlike:
        faults = [f"{name} is in one only" for name in alone] + unlike
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise InputError(
            f"{first.path} and {second.path} do not match: {', '.join(faults[:3])}{more}; "
            "only models of the same architecture can be interpolated"
        )
    mixed = {name: mix(first.tensors[name], second.tensors[name], alpha) for name in shared}
    return {**first.tensors, **second.tensors, **mixed}


def _students(weights: Weights) -> dict[str, Tensor]:
    return {name: value for name, value in weights.tensors.items() if name.startswith(STUDENT)}


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def region_head_of(first: Weights, second: Weights) -> dict[str, str]:
    """Returns what the mixed file says of its region head; {} when neither file says anything.

    Raises:
        InputError: the two were trained with different ones.
    """
    heads = {path.metadata[KEY]: path.path for path in (first, second) if KEY in path.metadata}
    if len(heads) > 1:
        raise InputError(
            f"{first.path} was trained with region_head={first.metadata[KEY]}, {second.path} with "
            f"region_head={second.metadata[KEY]}; only models of one region head can be mixed"
        )
    return {KEY: next(iter(heads))} if heads else {}


def interpolate(config: InterpolateConfig) -> None:
    """Interpolates the weights of two CLIPs, two detectors, or a CLIP and the detector trained from it."""
    first, second = read(config.first), read(config.second)
    out = Path(config.out)
    one = len(config.alpha) == 1
    files = [out if one else out / f"alpha-{alpha:g}.safetensors" for alpha in config.alpha]
    for given in (first.path, second.path):
        if any(file.resolve() == Path(given).resolve() for file in files):
            raise InputError(f"out={config.out} would overwrite {given}; give another path")
    whole = second if second.is_detector or not first.is_detector else first
    head = region_head_of(first, second)
    metadata = {**whole.metadata, **head}
    if config.part == "clip":
        tower = {key: value for key, value in whole.metadata.items() if key == TEXT_TOWER}
        metadata = {"format": CLIP, "config": whole.clip, **head, **tower}
    for alpha, file in zip(config.alpha, files, strict=True):
        tensors = between(first, second, alpha)
        if metadata["format"] == CLIP:
            tensors = {
                name.removeprefix(PREFIX): value for name, value in tensors.items() if name.startswith(PREFIX)
            }
        write_weights(file, tensors, metadata)
        print(f"{file}: {1 - alpha:g} of {first.path}, {alpha:g} of {second.path}")
