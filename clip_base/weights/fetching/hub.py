"""Weights on the Hugging Face hub: `hf://owner/name[@revision][/file]`, and open_clip's pairs of names.

The package `huggingface_hub` fetches and caches; its HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE and tokens count.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

from clip_base.jobs.plugins import did_you_mean
from clip_base.runtime.errors import InputError, quote
from clip_base.storage.files import read_json, write_json
from clip_base.storage.hashing import file_hash

SCHEME = "hf://"
INSTALL = "pip install 'regionclip[hub]'"
CONFIGS = ("open_clip_config.json", "config.json")
# What a repository's weights may be called, in the order of preference, and the config that belongs to them.
# A repository with open_clip's config may hold other models beside it, such as the image tower alone.
_KNOWN = (
    ("open_clip_model.safetensors", "open_clip_config.json"),
    ("open_clip_pytorch_model.safetensors", "open_clip_config.json"),
    ("open_clip_pytorch_model.bin", "open_clip_config.json"),
    ("model.safetensors", "config.json"),
    ("model.safetensors.index.json", "config.json"),
    ("pytorch_model.bin", "config.json"),
)
_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_RECORD = "sha256.json"


@dataclass(frozen=True)
class Address:
    """A place on the hub.

    Attributes:
        repository: owner/name.
        revision: a branch, tag or commit; None: the default branch.
        file: a path in the repository; "": the weights are looked for.
    """

    repository: str
    revision: str | None = None
    file: str = ""

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{SCHEME}{self.repository}{revision}" + (f"/{self.file}" if self.file else "")


def parse(text: str) -> Address | None:
    """Returns the place that a text means: an address, or open_clip's `MODEL/PRETRAINED`; None for others.

    Raises:
        InputError: an address without an owner or a name.
    """
    if text in (table := open_clip_table()):
        return Address(table[text])
    if not text.startswith(SCHEME):
        model, _, tag = text.partition("/")
        tags = [pair.partition("/")[2] for pair in table if pair.partition("/")[0] == model]
        if tags and tag and "/" not in tag and not tag.endswith(_WEIGHTS):
            raise InputError(f"open_clip has no {model} pretrained as {tag!r}; {did_you_mean(tag, tags)}")
        return None
    parts = text.removeprefix(SCHEME).split("/")
    if len(parts) < 2 or not all(parts[:2]) or ".." in parts:
        raise InputError(f"{quote(text)} is not of the form {SCHEME}owner/name[@revision][/file]")
    name, _, revision = parts[1].partition("@")
    return Address(f"{parts[0]}/{name}", revision or None, "/".join(parts[2:]))


def is_model(text: str) -> bool:
    """Whether an address names a place in a repository of models; datasets and spaces hold files only."""
    return text.startswith(SCHEME) and not text.startswith((f"{SCHEME}datasets/", f"{SCHEME}spaces/"))


@cache
def open_clip_table() -> dict[str, str]:
    """Returns the repository of each `MODEL/PRETRAINED` of open_clip whose towers are CLIP's."""
    text = (files("clip_base") / "data_files" / "open_clip.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines())
    return {f"{row['model']}/{row['pretrained']}": row["repository"] for row in rows}


def fetch(address: Address, folder: Path) -> Path:
    """Returns the weights at an address, fetched unless the hub's cache has them; their config lies beside.

    The sha256 of each file is kept at the first fetch, and compared at every later one.

    Args:
        address: the place.
        folder: takes the record of hashes.

    Raises:
        InputError: `huggingface_hub` is not installed; there is no such repository, revision or file, or no
            right to it; no network and no copy; or a copy is not what was fetched first.
    """
    hub = _library()
    try:
        names = _names(hub, address)
        file, others = _choose(address, names)
        for other in others:
            _download(hub, address, other)
        path = _download(hub, address, file)
    except InputError:
        raise
    except Exception as error:  # of the library, of the network below it, of the disk
        raise InputError(f"{address} cannot be fetched: {_reason(error)}") from None
    _check(path, address, folder)
    return path.parent if path.name.endswith(".index.json") else path


def upload(
    address: Address, paths: Mapping[str, Path], texts: Mapping[str, str], private: bool = False
) -> str:
    """Puts files into a repository, as one commit; a repository that does not exist is made.

    Args:
        address: the repository, and its branch.
        paths: files by their names there.
        texts: contents by their names there.
        private: of a new repository.

    Returns:
        The commit's address for browsers.

    Raises:
        InputError: `huggingface_hub` is not installed; there is no token, or it may not write there; no
            network; or the hub refuses.
    """
    hub = _library()
    if hub.get_token() is None:
        raise InputError(f"{address} cannot be written without a token: run `hf auth login`, or set HF_TOKEN")
    try:
        api = hub.HfApi(endpoint=endpoint())
        api.create_repo(address.repository, private=private or None, exist_ok=True)
        if address.revision:
            api.create_branch(address.repository, branch=address.revision, exist_ok=True)
        contents: dict[str, Path | bytes] = {**paths, **{name: text.encode() for name, text in texts.items()}}
        operations = [
            hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
            for name, content in contents.items()
        ]
        message = f"Upload {', '.join(contents)}"[:200]
        done = api.create_commit(
            address.repository, operations, commit_message=message, revision=address.revision
        )
    except Exception as error:  # of the library, of the network below it, of the disk
        raise InputError(f"{address} cannot be written: {_reason_of_upload(error)}") from None
    return str(done.commit_url)


def _reason_of_upload(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return "the hub does not know the token; run `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return "the token may not write there; make one with the permission to write"
    return "the hub cannot be reached" if _is_network(error) else _reason(error)


def _library() -> ModuleType:
    try:
        import huggingface_hub.constants  # noqa: PLC0415 (optional)
    except ImportError:
        raise InputError(f"weights on the hub need huggingface_hub: {INSTALL}") from None
    return huggingface_hub


def endpoint() -> str | None:
    """Returns the address of the hub where the environment names one, such as a mirror."""
    return os.environ.get("HF_ENDPOINT") or None


def _names(hub: ModuleType, address: Address) -> list[str]:
    """Returns the files of a repository; without a network, those of the copy in the cache."""
    if address.file:
        return [address.file]
    try:
        if not hub.constants.HF_HUB_OFFLINE:
            api = hub.HfApi(endpoint=endpoint())
            return list(api.list_repo_files(address.repository, revision=address.revision))
    except OSError as error:  # the library's errors of a refusing server are OSErrors with a response
        if getattr(error, "response", None) is not None:
            raise
    except Exception as error:
        if not _is_network(error):
            raise
    kept = hub.snapshot_download(address.repository, revision=address.revision, local_files_only=True)
    return [str(path.relative_to(kept)) for path in Path(kept).rglob("*") if path.is_file()]


def _choose(address: Address, names: Sequence[str]) -> tuple[str, list[str]]:
    """Returns the file with the weights, and the others that it needs beside it."""
    if address.file:
        return address.file, []
    for file, config in _KNOWN:
        if file in names and (config in names or file == "model.safetensors"):
            beside = [name for name in names if name == config]
            if file.endswith(".index.json"):
                beside += [name for name in names if re.fullmatch(r"model-[\w-]+\.safetensors", name)]
            return file, beside
    weights = [name for name in names if name.endswith(_WEIGHTS)]
    if len(weights) != 1:
        known = ", ".join(weights[:5]) or "none"
        raise InputError(f"which file of {address}? Name one behind it; its files of weights are: {known}")
    return weights[0], [name for name in CONFIGS if name in names]


def _download(hub: ModuleType, address: Address, file: str) -> Path:
    return Path(hub.hf_hub_download(address.repository, file, revision=address.revision, endpoint=endpoint()))


def _check(path: Path, address: Address, folder: Path) -> None:
    """Compares a file's content with what was fetched first at its commit."""
    record = folder / _RECORD
    known: dict[str, Any] = read_json(record, "record of hashes") if record.exists() else {}
    # The cache keeps each commit in a folder of its own: .../snapshots/COMMIT/file.
    key = f"{address.repository}@{_commit_of(path)}/{path.name}"
    found = file_hash(path)
    if known.setdefault(key, found) != found:
        raise InputError(
            f"{path} is not what was fetched first (its sha256 is {found}, not {known[key]}); delete it to "
            "fetch it again"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(record, known, indent=2)


def _commit_of(path: Path) -> str:
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else ""


def _is_network(error: Exception) -> bool:
    """Whether the network failed, or is not to be used, as against a server that refuses."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"ConnectionError", "ConnectError", "TimeoutException", "OfflineModeIsEnabled"})


def _reason(error: Exception) -> str:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "GatedRepoError" in kinds:
        return "its owner gives access on request; ask there, and set HF_TOKEN"
    if "RepositoryNotFoundError" in kinds:
        return "there is no such repository, or it is private (then set HF_TOKEN)"
    if "RevisionNotFoundError" in kinds:
        return "there is no such revision"
    if "LocalEntryNotFoundError" in kinds:
        return "the hub cannot be reached (or HF_HUB_OFFLINE is set), and no copy is in its cache"
    if "EntryNotFoundError" in kinds or "RemoteEntryNotFoundError" in kinds:
        return "there is no such file"
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return first[:200]
