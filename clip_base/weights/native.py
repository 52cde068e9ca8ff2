"""Our own format: safetensors with the sizes in the metadata, so that a file needs no config."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clip_base.jobs import config as configs
from clip_base.models.clip import CLIP, ImageTower
from clip_base.models.configs import CLIPConfig
from clip_base.runtime import distributed
from clip_base.runtime.errors import InputError, quote, shortened
from clip_base.storage.files import existing_file, naming_full_disk, parse_json, replacing
from clip_base.storage.kinds import kind_of
from clip_base.storage.safetensors_files import sort_metadata

FORMAT = "clip_base.clip/1"
TEXT_TOWER = "text_tower"  # in the metadata: "none" of weights that have none
_FEW = 10_000_000  # numbers that may be allocated whatever a file holds
C = TypeVar("C")
M = TypeVar("M", bound=torch.nn.Module)


def save_clip(model: CLIP, path: str | Path, notes: Mapping[str, str] | None = None) -> None:
    """Writes a CLIP with its sizes, atomically.

    Args:
        model: what to write.
        path: where.
        notes: what else the file's metadata shall say of the weights, for packages that stand on this one.
    """
    sizes = json.dumps(dataclasses.asdict(model.config))
    own = {"format": FORMAT, "config": sizes} | towers_note(model)
    write_weights(path, model.state_dict(), {**(notes or {}), **own})


def towers_note(model: CLIP) -> dict[str, str]:
    """Returns what a file's metadata says of a CLIP without a text tower; nothing of a whole one."""
    return {TEXT_TOWER: "none"} if isinstance(model, ImageTower) else {}


def maker(metadata: Mapping[str, str]) -> type[CLIP]:
    """Returns what makes the CLIP of a file with this metadata, whole or without a text tower."""
    return ImageTower if metadata.get(TEXT_TOWER) == "none" else CLIP


def load_clip(path: str | Path) -> CLIP:
    """Reads a CLIP that `save_clip` wrote, in evaluation mode.

    Raises:
        InputError: the file is missing, damaged, of another form, or its tensors do not fit its sizes.
    """
    weights, metadata = read_weights(path)
    if metadata.get("format") != FORMAT:
        raise InputError(
            f"{path} holds {quote(metadata.get('format', 'unnamed weights'))}, expected {FORMAT!r}"
        )
    config = configs.check(CLIPConfig, sizes_in(metadata, "config", path), f"sizes in {path}")
    model = sized(maker(metadata), config, weights, path)
    load_exactly(model, weights, path)
    return model.eval().to(memory_format=torch.channels_last)


def sizes_in(metadata: Mapping[str, str], key: str, path: str | Path) -> Any:
    """Returns the JSON value under a key of a file's metadata; InputError when there is none."""
    if key not in metadata:
        raise InputError(f"{path} does not say its {key} in its metadata; write the file again")
    return parse_json(metadata[key], f"{key} in the metadata of {path}")


def sized(make: Callable[[C], M], config: C, weights: Mapping[str, Tensor], path: str | Path) -> M:
    """Builds a model whose config is in a weights file; arguments and errors as `require_sizes`'."""
    require_sizes(make, config, weights, path)
    return make(config)


def require_sizes(
    make: Callable[[C], torch.nn.Module], config: C, weights: Mapping[str, Tensor], path: str | Path
) -> None:
    """Checks that the tensors of a file can make the model that its config asks for, before it is built.

    Args:
        make: makes the model of its config.
        config: what the file says of its sizes, which costs nothing to exaggerate.
        weights: the file's tensors.
        path: the file.

    Raises:
        InputError: the config asks for more blocks or numbers than there are in the file.
    """
    deepest = max(_counts(dataclasses.asdict(cast(Any, config))), default=0)
    if deepest > len(weights):
        raise InputError(
            f"weights {path}: its metadata asks for {deepest:,} blocks, and it holds {len(weights):,} "
            "tensors; the file is damaged or was edited: get it again"
        )
    try:
        with torch.device("meta"):  # shapes only
            wanted = sum(value.numel() for value in make(config).state_dict().values())
    except InputError:
        raise
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:  # sizes that no tensor can have
        reason = shortened(str(error).partition("\n")[0], 150)
        raise InputError(f"weights {path}: its metadata asks for a model that cannot be: {reason}") from None
    there = sum(value.numel() for value in weights.values())
    if wanted > 2 * there + _FEW:  # of a tensor that is merely missing `load_exactly` tells the name
        raise InputError(
            f"weights {path}: its metadata asks for {wanted:,} numbers, and its tensors hold {there:,}; the "
            "file is damaged or was edited: get it again"
        )


def _counts(config: Any, key: str = "") -> Iterator[int]:
    """Yields how many blocks a config asks for."""
    if isinstance(config, dict):
        for name, value in config.items():
            yield from _counts(value, name)
    elif isinstance(config, list):
        for value in config:
            yield from _counts(value, key)
    elif key in ("layers", "head_convs"):
        yield int(config)


def describe(metadata: dict[str, str]) -> dict[str, Any]:
    """Returns a file's metadata with its JSON values read."""
    return {key: json.loads(value) if value[:1] in "{[" else value for key, value in metadata.items()}


def write_weights(path: str | Path, weights: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes weights as safetensors, atomically; equal weights and metadata give equal bytes.

    Shared storage is copied, so every tensor stands alone.
    Several processes must all call it; the first writes.
    """
    path, whole = Path(path), distributed.full(weights)
    if not distributed.is_first():
        return
    with replacing(path) as temporary, naming_full_disk(path, SafetensorError):
        alone = {name: value.detach().cpu().contiguous().clone() for name, value in whole.items()}
        save_file(alone, temporary, metadata)
        sort_metadata(temporary)


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a safetensors file; returns its tensors and its metadata.

    Raises:
        InputError: the file is missing, cut off or no safetensors file.
    """
    with open_safetensors(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def read_metadata(path: str | Path) -> dict[str, str]:
    """Returns the metadata of a safetensors file without reading its tensors.

    Raises:
        InputError: the file is missing, cut off or no safetensors file.
    """
    with open_safetensors(path) as file:
        return dict(file.metadata() or {})


@contextlib.contextmanager
def open_safetensors(path: str | Path, what: str = "weights file") -> Iterator[Any]:
    """Opens a safetensors file as the library's `safe_open` does, with torch's tensors.

    Raises:
        InputError: the file is missing, cut off or no safetensors file, also while it is read.
    """
    path = existing_file(path, what)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except InputError:
        raise
    except Exception as error:  # the library has errors of several languages
        raise _unreadable(path, error, what) from None


def _unreadable(path: Path, error: Exception, what: str) -> InputError:
    if _is_pickle(path):
        return InputError(
            f"{what} {path} is no safetensors file but what torch.save writes: rename it to .pth"
        )
    reason = shortened(" ".join(str(error).split()), 200)
    kind = kind_of(path)
    if kind not in ("", "a safetensors file"):
        return InputError(f"{what} {path} is {kind}, and a safetensors file is needed")
    return InputError(
        f"{what} {path} cannot be read ({reason}); it was truncated or is not a safetensors file: copy it "
        "again"
    )


def _is_pickle(path: Path) -> bool:
    """Whether a file that is no safetensors file begins as a pickle or the archive of one."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(9)
    return head[:2] == b"PK" or (head[:1] == b"\x80" and head[8:] != b"{")


def not_finite(weights: Mapping[str, Tensor]) -> str:
    """Returns which tensors hold NaN or infinity, in words; "" when none does."""
    bad = [
        f"{name} ({int((~value.isfinite()).sum()):,} of {value.numel():,} numbers)"
        for name, value in weights.items()
        # A sum is finite only when all its terms are, and takes a fraction of the time of looking at each.
        if value.is_floating_point() and not value.sum(dtype=torch.float32).isfinite()
        if not bool(value.isfinite().all())
    ]
    more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
    return f"{len(bad)} tensors hold NaN or infinity: {', '.join(bad[:4])}{more}" if bad else ""


def require_finite(weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Raises an InputError that names the tensors which hold NaN or infinity."""
    bad = not_finite(weights)
    if bad:
        raise InputError(
            f"weights {source} cannot be used: {bad}; copy the file again, or repeat the training"
        )


def load_exactly(module: torch.nn.Module, weights: dict[str, Tensor], source: str | Path) -> None:
    """Loads weights when every key and shape fits.

    Raises:
        InputError: keys are missing, left over or misshapen, or numbers are not finite; the first few of each
            are listed.
    """
    own = module.state_dict()
    missing = sorted(own.keys() - weights.keys())
    extra = sorted(weights.keys() - own.keys())
    misshapen = [
        f"{key} {list(weights[key].shape)} for {list(own[key].shape)}"
        for key in sorted(own.keys() & weights.keys())
        if own[key].shape != weights[key].shape
    ]
    faults = []
    for what, keys in (("missing", missing), ("left over", extra), ("misshapen", misshapen)):
        if keys:
            more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
            faults.append(f"{len(keys)} {what}: {', '.join(keys[:4])}{more}")
    if faults:
        raise InputError(f"weights {source} do not fit the model: {'; '.join(faults)}")
    require_finite(weights, source)
    module.load_state_dict({key: distributed.shard_like(weights[key], value) for key, value in own.items()})
