"""The job `push`: weights to the Hugging Face hub, with a model card.

clip-base push runs/detector hf://me/detector metrics=runs/evaluation/metrics.json
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from clip_base.jobs.config import REQUIRED, option
from clip_base.jobs.everyday import everyday
from clip_base.runtime.errors import InputError
from clip_base.storage.files import existing, existing_file
from clip_base.weights.fetching import hub
from clip_base.weights.fetching.model_card import model_card
from clip_base.weights.fetching.published import MIB

CARD, CONFIG, METRICS = "README.md", "config.yaml", "metrics.json"
# Of a training's folder: the card has the config without the paths of this machine.
_LEFT_OUT = (CARD, CONFIG, "log.jsonl")
_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")


@everyday(
    "push runs/detector hf://me/detector --dry-run",
    input="folder metrics license",
    output="to private dry_run",
)
@dataclass
class PushConfig:
    """Options of `push`."""

    folder: str = option(
        REQUIRED, "folder of a training or of `convert`, or a file of weights", positional=True
    )
    to: str = option(REQUIRED, "where to: hf://owner/name or hf://owner/name@branch", positional=True)
    metrics: list[str] = option([], "metrics.json of evaluations, for the card; a training's own is found")
    license: str = option("", "license of the weights, for the card, such as apache-2.0; empty: not stated")
    private: bool = option(False, "make the repository private if it is new")
    dry_run: bool = option(False, "print the files and the card, and upload nothing")


def push(config: PushConfig) -> None:
    """Uploads weights to the Hugging Face hub, with a model card made from their config and metrics.

    A README.md in the folder is taken as the card. Checkpoints, logs and config.yaml, which has paths of this
    machine, are not uploaded.
    """
    address = hub.parse(config.to)
    if address is None or address.file or not config.to.startswith(hub.SCHEME):
        raise InputError(f"to={config.to} must be hf://owner/name or hf://owner/name@branch")
    source = existing(config.folder, "folder of weights")
    files = files_of(source)
    card = _card(config, address, source, files)
    for file in files:
        print(f"{file.name}: {file.stat().st_size / MIB:,.1f} MiB")
    if config.dry_run:
        print(f"{CARD}:\n{card}")
        return
    print(f"uploading to {address}", flush=True)
    print(hub.upload(address, {file.name: file for file in files}, {CARD: card}, config.private))


def files_of(source: Path) -> list[Path]:
    """Returns the files of a folder that are uploaded, or the one file.

    Raises:
        InputError: none of them holds weights.
    """
    if source.is_file():
        return [source]
    found = sorted(path for path in source.iterdir() if path.is_file() and not path.name.startswith("."))
    files = [path for path in found if path.name not in _LEFT_OUT and path.suffix != ".lock"]
    if not any(path.suffix in _WEIGHTS for path in files):
        names = ", ".join(path.name for path in found[:5]) or "none"
        raise InputError(
            f"folder {source} holds no weights ({', '.join(_WEIGHTS)}); its files are: {names}. Give the "
            "folder of a finished training, or of `clip-base convert`"
        )
    return files


def _card(config: PushConfig, address: hub.Address, source: Path, files: list[Path]) -> str:
    own = source / CARD
    if source.is_dir() and own.is_file():
        print(f"the model card is {own}")
        return own.read_text(encoding="utf-8")
    metrics = {}
    for path in [*([source / METRICS] if (source / METRICS).is_file() else []), *map(Path, config.metrics)]:
        file = existing_file(path, "metrics file")
        title = "training" if file.parent == source else file.parent.name or file.stem
        metrics[title if title not in metrics else str(file)] = file
    settings = source / CONFIG
    form = next((form for file in files if (form := _form(file))), "")
    return model_card(str(address), form, settings if settings.is_file() else None, metrics, config.license)


def _form(file: Path) -> str:
    """Returns what a file's metadata say that it holds; "" when they do not, or when it has none.

    Raises:
        InputError: a safetensors file is damaged.
    """
    if file.suffix != ".safetensors":
        return ""
    try:
        with safe_open(os.fspath(file), framework="pt") as opened:
            return str((opened.metadata() or {}).get("format", ""))
    except SafetensorError as error:
        raise InputError(f"{file} is damaged and is not uploaded: {error}") from None
