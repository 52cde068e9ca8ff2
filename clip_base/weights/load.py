"""From a published name, or a file in any known format, to a model and its preprocessing."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clip_base.images.preprocess import Preprocess
from clip_base.jobs.config import REQUIRED, option
from clip_base.models.clip import CLIP
from clip_base.models.configs import ACTIVATIONS
from clip_base.runtime.announce import announced
from clip_base.runtime.errors import InputError, note, quote
from clip_base.storage.files import existing
from clip_base.storage.remote import address_of
from clip_base.storage.remote_cache import cache_folder
from clip_base.weights.fetching import download, hub
from clip_base.weights.reading import PRECISIONS, Report, is_safetensors, read_clip

LONGEST = 1000  # characters of a path that a message has: a path is shown whole
ENDINGS = (".safetensors", ".pt", ".pth", ".pkl", ".bin", ".ckpt", ".npy")  # of files of weights


@dataclass(kw_only=True)
class WeightsFile:
    """Which weights a job on one file reads."""

    file: str = option(REQUIRED, "weights file or folder, or a published model's name", positional=True)
    activation: str = option("", "activation of a file that does not state it", choices=("", *ACTIVATIONS))


def find(name_or_path: str | Path, folder: str | Path | None = None) -> Path:
    """Returns the weights file: a path as it is, or a published file, downloaded when it is not there.

    Args:
        name_or_path: a file, a folder, the name of a published file (see `download.files`), a place on the
            Hugging Face hub (see `hub.parse`), or another address, of which the cache gets a copy.
        folder: where published files are kept; None: see `remote_cache.cache_folder`.

    Raises:
        InputError: there is neither such a file nor such a model, or it cannot be downloaded.
    """
    path = Path(name_or_path)
    if path.exists():
        return path
    known, name = download.files(), address_of(name_or_path) or str(name_or_path)
    if address_of(name) is not None and not hub.is_model(name):
        return existing(name, "weights file")
    if name in known:
        return download.fetch(name, folder)
    address = hub.parse(name)
    if address is not None:
        return hub.fetch(address, cache_folder() if folder is None else Path(folder))
    if path.suffix.lower() in ENDINGS:
        return existing(path, "weights file")
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    raise InputError(
        f"there is no weights file {quote(name, LONGEST)} and no published model of that name; "
        + (f"did you mean {close[0]!r}? " if close else "")
        + "`clip-base fetch --list` lists the published ones; open_clip's are named as in "
        "ViT-B-32/laion2b_s34b_b79k, those on the hub hf://owner/name"
    )


def local_copy(weights: str) -> str:
    """Returns weights as they were given, or, where they are on the hub, the path of their copy here.

    Raises:
        InputError: they cannot be fetched.
    """
    on_hub = not Path(weights).exists() and hub.parse(weights) is not None
    return str(find(weights)) if on_hub else weights


def weight_files(config: Any, *keys: str) -> dict[str, Path | str]:
    """Returns the files that some options name as `find` does, but the empty ones: `RunFolder`'s `inputs`."""
    named = {key: getattr(config, key) for key in keys}
    return {key: find(value) for key, value in named.items() if value}


def read_any(
    name_or_path: str | Path, activation: str = "", precision: str = "fp32", folder: str | Path | None = None
) -> tuple[CLIP, Report]:
    """Reads a published model by name, or any file; see `reading.read_clip`."""
    path = find(name_or_path, folder)
    with announced(f"loading {path}"):
        return read_clip(path, activation, precision)


def load_clip(name_or_path: str | Path, activation: str = "", precision: str = "fp32") -> CLIP:
    """Returns a CLIP from a published name or any known file: on the CPU, evaluating, channels-last.

    Args:
        name_or_path: a file, a folder, or one of `clip_base.available_models()`.
        activation: "quick_gelu" or "gelu" for files that do not say; "" assumes quick_gelu, as OpenAI's
            models, and notes it.
        precision: type of the weights: "fp32", "fp16", "bf16", or "stored" for the file's own.

    Raises:
        InputError: the file is missing, damaged, of no known format, or does not fit.
    """
    model, report = read_any(name_or_path, activation, precision)
    _tell(report)
    return model


def load(
    name: str | Path,
    device: str | torch.device | None = None,
    jit: bool = False,
    download_root: str | None = None,
    *,
    precision: str = "auto",
    activation: str = "",
) -> tuple[CLIP, Preprocess]:
    """Loads a CLIP, as openai/CLIP's function of that name.

    Args:
        name: one of `available_models()`, or a file or folder in any known format.
        device: where the model goes; None: the GPU when there is one, else the CPU.
        jit: only False; code inside archives is never run.
        download_root: folder for published files; None: $CLIP_BASE_CACHE, else ~/.cache/clip.
        precision: type of the weights: "fp32", "fp16", "bf16", or "auto": fp32 on the CPU, elsewhere what the
            file holds (half precision in OpenAI's files), as openai/CLIP does.
        activation: "quick_gelu" or "gelu" for files that do not say; "" assumes quick_gelu and notes it.

    Returns:
        The model in evaluation mode, and a function from a PIL image to its input: [3, R, R] float32,
            normalized.

    Raises:
        InputError: there is no such model or file, it cannot be downloaded, is damaged or does not fit.
    """
    if jit:
        raise InputError(
            "jit=True would run code from the file; omit it, and use torch.compile(model) for speed"
        )
    if precision not in (*PRECISIONS, "auto"):
        raise InputError(f"precision must be auto or one of {', '.join(PRECISIONS)}, found {precision!r}")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if precision == "auto":
        precision = "fp32" if place.type == "cpu" else "stored"
    model, report = read_any(name, activation, precision, download_root)
    _tell(report)
    return model.to(place), Preprocess(model.config.vision.resolution)


def _tell(report: Report) -> None:
    """Notes what was assumed of a file: a model with another activation computes something else."""
    for text in report.assumed:
        note(f"{report.path}: {text}", stacklevel=4)


def is_published(path: Path) -> bool:
    """Whether a file may be of another package's form: one that `torch.save` wrote."""
    return path.is_file() and not is_safetensors(path)
