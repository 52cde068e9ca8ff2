"""A job's output folder: its run, log and metrics.

Every job leaves `config.yaml` (resolved; itself a valid config file), `log.jsonl` (one line per step) and,
when it has ended well, `metrics.json`; of several processes the first writes them. The same command on a
finished folder returns at once; another is refused.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from clip_base.jobs import config as configs
from clip_base.jobs import plugins
from clip_base.jobs.schema import options_of
from clip_base.runtime.errors import InputError, quote, shortened
from clip_base.storage.files import is_file, read_json, read_log, read_text, write_json, write_text
from clip_base.storage.hashing import content_hash
from clip_base.storage.lock import is_lock, lock_folder
from clip_base.storage.tables import read_yaml

Inputs = Mapping[str, Path | str]
CONFIG, INPUTS = "config.yaml", ".inputs.json"
REMEDY = "give another out= or delete that folder"


class RunFolder:
    """The folder `out` of one run of one job.

    Args:
        out: the folder.
        config: the job's options.
        job: its name.
        inputs: what decides the result besides the options, by what it is called to the user: paths of files
            and of folders of weights, whose contents count, and texts.
        part: which part of the folder this process writes, see `lock_folder`; "" for all.

    While it is referred to, no other process gets the folder, or that part.

    Attributes:
        inputs: the hashes of the paths' contents, and the texts.

    Raises:
        InputError: the folder holds another run; the options that differ, or the inputs that changed since it
            began, are named. An input does not exist. Another process writes there.
    """

    def __init__(self, out: str, config: Any, job: str, inputs: Inputs | None = None, part: str = "") -> None:
        self.path = Path(out)
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"out={out} is a file; give a folder")
        here, held = self.path / CONFIG, f"# {job}\n{configs.to_yaml(config)}"
        others = self.path.exists() and any(not _is_leftover(path) for path in self.path.iterdir())
        # Looked for last: the first process of a group writes it before anything else, and may do so now.
        if others and not here.exists():
            raise InputError(f"{out} is not empty and has no run of {job}; give another out= or empty it")
        if here.exists() and not self._only_begun():  # before files are read to the end: this is told at once
            self._same_run(here, config, job)
        self.inputs = hashes_of(inputs or {})
        self._lock = lock_folder(self.path, part) if _writes() else None
        is_run = here.exists() and not self._only_begun()
        if is_run:
            self._same_run(here, config, job)
        if is_run and inputs:
            self._same_inputs(inputs)
        if _writes():
            write_text(here, held)
            if self.inputs and not is_run:
                write_json(self.path / INPUTS, self.inputs)
        self.log_path = self.path / "log.jsonl"

    def _only_begun(self) -> bool:
        """Whether nothing but the config was written: a call that failed at once holds no run."""
        return all(path.name in (CONFIG, INPUTS) or _is_leftover(path) for path in self.path.iterdir())

    def _same_inputs(self, inputs: Inputs) -> None:
        record = self.path / INPUTS
        if not record.exists():
            raise InputError(f"{self.path} does not say which files its run read; {REMEDY}")
        there = read_json(record, "record of the inputs")
        if not isinstance(there, dict):
            raise InputError(f"{record} does not say which files its run read; {REMEDY}")
        changed = [
            f"{what} ({inputs[what]})" if isinstance(inputs.get(what), Path) else shortened(what)
            for what in {**there, **self.inputs}
            if there.get(what) != self.inputs.get(what)
        ]
        if changed:
            raise InputError(
                f"{' and '.join(changed[:3])} changed since the run in {self.path} started; {REMEDY}"
            )

    def _same_run(self, here: Path, config: Any, job: str) -> None:
        text = read_text(here, "config of the run")
        other_job = text.partition("\n")[0].removeprefix("# ")
        if other_job != job:
            raise InputError(f"{self.path} holds a run of {quote(other_job)}, not of {job!r}; {REMEDY}")
        free = configs.runtime_only(type(config))
        there = _flat(OmegaConf.to_container(read_yaml(here, "config of the run")))
        here_now = _flat(OmegaConf.to_container(OmegaConf.create(configs.to_yaml(config))))
        # An option that came later does, at its default, what was done without it.
        later = [key for key in here_now.keys() - there.keys() if key not in free]
        known = _defaults(config) if later else {}
        there |= {key: known[key] for key in later if key in known}
        differing = differences(there, here_now, free)
        if differing:
            raise InputError(f"{self.path} holds another run ({'; '.join(differing[:3])}); {REMEDY}")

    @property
    def metrics_path(self) -> Path:
        """The file whose presence says that the run has ended well."""
        return self.path / "metrics.json"

    def finished(self) -> dict[str, Any] | None:
        """Returns the metrics of a run that has ended, else None.

        Raises:
            InputError: they are damaged.
        """
        if not self.metrics_path.exists():
            return None
        metrics = read_json(self.metrics_path, "metrics")
        if not isinstance(metrics, dict):
            raise InputError(f"metrics {self.metrics_path} are damaged: {quote(metrics)}; {REMEDY}")
        return metrics

    def finish(self, metrics: dict[str, Any]) -> None:
        """Writes the metrics; from now on the run counts as ended."""
        if not _writes():
            return
        write_json(self.metrics_path, metrics, indent=2)

    def rewind_log(self, step: int) -> None:
        """Drops what was logged after `step`, so that a resumed run's log is an undisturbed run's.

        Raises:
            InputError: a line is damaged, or its step is no number.
        """
        if not self.log_path.exists() or not _writes():
            return
        kept = []
        for number, entry in enumerate(read_log(self.log_path, "log"), 1):
            at = entry.get("step", 0)
            if not isinstance(at, int | float):
                raise InputError(
                    f"log {self.log_path}, line {number}: step is {quote(at)}; correct that line"
                )
            if at <= step:
                kept.append(json.dumps(entry) + "\n")
        write_text(self.log_path, "".join(kept))

    def log(self, entry: dict[str, Any]) -> None:
        """Appends an entry to `log.jsonl`, as one line."""
        if not _writes():
            return
        with self.log_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def _defaults(config: Any) -> dict[str, Any]:
    """Returns the default of every option of a config, those of its plugins among them, by dotted key."""
    found = {}
    for key, default, group in _options(type(config)):
        found[key] = default
        name = getattr(config, key.removesuffix(".name"), {}).get("name", "") if group else ""
        if name and name != "none":
            schema = plugins.schema_of(plugins.load(group, name))
            found |= {inner: value for inner, value, _ in _options(schema, key.removesuffix("name"))}
    return found


def _options(schema: type, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    return ((one.key, one.default, one.group) for one in options_of(schema, prefix=prefix))


def _writes() -> bool:
    """Whether this process is the one of its group that writes; a job without torch has no group."""
    if os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0":  # of torchrun
        return False
    distributed = sys.modules.get("clip_base.runtime.distributed")
    return distributed is None or bool(distributed.is_first())


def _is_leftover(path: Path) -> bool:
    """Whether a kill left this file of `replacing`, or it is of the lock."""
    temporary = path.name.startswith((f".{CONFIG}.", f".{INPUTS}.")) and path.name.endswith(".tmp")
    return temporary or is_lock(path)


def differences(there: Mapping[str, Any], here: Mapping[str, Any], free: Collection[str] = ()) -> list[str]:
    """Returns a sentence for each key whose values differ, but the `free` ones and those below them."""
    below = tuple(f"{key}." for key in free)
    return [
        f"{shortened(key)}={quote(there.get(key))} there, {quote(here.get(key))} here"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key) and key not in free and not key.startswith(below)
    ]


def hashes_of(inputs: Inputs) -> dict[str, str]:
    """Returns what identifies inputs: the hashes of the paths' contents, and the texts as they are."""
    return {what: content_hash(i) if isinstance(i, Path) else i for what, i in inputs.items()}


def files_of(config: Any, *keys: str) -> dict[str, Path | str]:
    """Returns the files among some options' values, for `RunFolder`'s `inputs`.

    Args:
        config: a job's options.
        keys: options that may name a file, or several with commas between them; of one that is a list, a
            plugin or a group, all in it may.
    """
    named: dict[str, Any] = {}
    for key in keys:
        value = getattr(config, key)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
        entries = dict(enumerate(value)) if isinstance(value, list) else value
        nested = isinstance(entries, dict)
        named |= {f"{key}.{name}": entry for name, entry in entries.items()} if nested else {key: entries}
    texts = {key: value for key, value in named.items() if isinstance(value, str)}
    for key, text in {k: text for k, text in texts.items() if not is_file(text)}.items():
        texts |= {f"{key}[{number}]": part.strip() for number, part in enumerate(text.split(","))}
    return {key: Path(text) for key, text in texts.items() if is_file(text)}


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.")
    return flat


def describe(config: Any) -> dict[str, Any]:
    """Returns a config as plain values, for manifests and weight files."""
    return dataclasses.asdict(config)
