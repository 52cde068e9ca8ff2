"""`out=` at an address of an object store: the job works in a folder here, which is copied there.

What is at the address already comes here first, so that any machine resumes a run. While the job works,
what it has finished is copied every half minute, and all of it when it ends, however it ends; manifests and
metrics, by which others see that a run is whole, always last. `.NAME.files.json` beside the output lists what
belongs together: a kill in the middle of copying leaves the list of before. `.NAME.lock.json` keeps a second
process out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from clip_base.runtime.errors import InputError, JobError
from clip_base.storage.files import parse_json, read_json, runs_here, write_json
from clip_base.storage.remote import RemoteError, RemoteFile, address_of, filesystem, name_of, repeated
from clip_base.storage.remote_cache import cache_folder, copy, digest, is_folder, listing

INTERVAL = 30.0  # seconds between two copies, and between two signs of life
PATIENCE = 3 * INTERVAL  # seconds without a sign of life after which a lock is taken over
_LAST = ("manifest.json", "metrics.json")
_STORES = ("s3", "gs", "gcs")


@contextlib.contextmanager
def working_copy(config: Any) -> Iterator[Any]:
    """Yields a job's config whose `out` is a folder here when it was an address; else the config itself.

    Raises:
        InputError: the address cannot be written, or another process writes there.
        JobError: what was done could not be copied there; it is here, and the same command resumes.
    """
    out = getattr(config, "out", "")
    address = address_of(out) if isinstance(out, str) else None
    if address is None:
        yield config
        return
    if address.partition("://")[0] not in _STORES:
        raise InputError(f"out={address} cannot be written; give a path, or an address at s3:// or gs://")
    mirror = Mirror(address.rstrip("/"))
    with mirror.kept():
        yield dataclasses.replace(config, out=str(mirror.local))


class Mirror:
    """An output at an address and its copy here.

    Args:
        address: of the folder or file that a job writes; files that the job writes beside it come along.

    Attributes:
        local: where the job works.
    """

    def __init__(self, address: str) -> None:
        self.address, self._name = address, name_of(address)
        self._base = address.removesuffix(self._name)
        place = cache_folder() / "out" / digest(address)
        self._folder, self._state = place / "work", place / "state.json"
        self.local = self._folder / self._name
        self._files, _ = filesystem(address)
        self._list, self._lock = (f"{self._base}.{self._name}.{what}.json" for what in ("files", "lock"))
        self._owner: dict[str, Any] = {
            "owner": uuid.uuid4().hex,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "machine": uuid.getnode(),  # names are alike in containers
            "beat": 0,
        }
        self._sent: dict[str, list[int]] = {}  # of each file that was copied: size, time of change
        self._ended, self._lost, self._copied = threading.Event(), False, False
        self._access = threading.Lock()

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Brings here what is there; keeps the address up to date until the end."""
        writes = os.environ.get("RANK", "0") == "0"  # of torchrun's processes the first one
        if writes:
            self._take_lock()
        try:
            with FileLock(self._made(self._state).with_suffix(".lock")):
                self._pull()
            if not writes:
                yield
                return
            thread = threading.Thread(target=self._keep, daemon=True)
            thread.start()
            try:
                yield
            finally:
                self._ended.set()
                thread.join()
                self._finish()
        finally:
            if writes and not self._lost:
                with contextlib.suppress(RemoteError):
                    self._remove(self._lock)

    def _made(self, file: Path) -> Path:
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    def _finish(self) -> None:
        try:
            self.push()
        except RemoteError as error:
            raise JobError(f"{error}; what was done is in {self.local}: the same command copies it") from None
        if self._lost:
            raise JobError(
                f"another process has taken {self.address} over, as this one gave no sign of life; what was "
                f"done is in {self.local}"
            )
        if self._copied:
            print(f"copied to {self.address}")

    # Copying

    def _pull(self) -> None:
        """Makes the folder here that of the address, unless it is what this machine has copied there last."""
        there = self._listed()
        known = read_json(self._state) if self._state.exists() else {}
        if there.get("token", "") != known.get("token", ""):
            shutil.rmtree(self._folder, ignore_errors=True)
            known = {}
        for name in there["files"]:
            target = self._folder / name
            if name not in known.get("sent", {}) or not target.exists():
                with RemoteFile(self._base + name) as source:
                    copy(source, target, resume=False)
                known.setdefault("sent", {})[name] = _stamp(target)
        self._sent = {name: known["sent"][name] for name in there["files"]}
        self._folder.mkdir(parents=True, exist_ok=True)
        write_json(self._state, {"token": there.get("token", ""), "sent": self._sent})

    def _listed(self) -> dict[str, Any]:
        if repeated(self._list, lambda: self._files.exists(self._list)):
            text = repeated(self._list, lambda: self._files.cat_file(self._list)).decode()
            found: dict[str, Any] = parse_json(text, self._list)
            return found
        # Copied there by somebody, or nothing.
        files = listing(self.address) if is_folder(self.address) else []
        if not files and repeated(self.address, lambda: self._files.exists(self.address)):
            files = [self.address]
        return {"files": [file.removeprefix(self._base) for file in files]}

    def push(self, whole: bool = True) -> None:
        """Copies what has changed here to the address.

        Args:
            whole: databases too, which may be half written while the job works.

        Raises:
            RemoteError: the store does not take it.
        """
        with self._access:
            if self._lost:
                return
            here = {name: _stamp(self._folder / name) for name in self._here(whole)}
            changed = [name for name, stamp in here.items() if self._sent.get(name) != stamp]
            gone = [name for name in self._sent if not (self._folder / name).exists()]
            if not changed and not gone:
                return
            for name in sorted(changed, key=lambda name: (name == self._name, Path(name).name in _LAST)):
                self._put(name)
                self._sent[name] = here[name]
            for name in gone:
                del self._sent[name]
            token, self._copied = uuid.uuid4().hex, True
            content = json.dumps({"token": token, "files": sorted(self._sent)}).encode()
            repeated(self._list, lambda: self._files.pipe_file(self._list, content))
            write_json(self._state, {"token": token, "sent": self._sent})
            for name in gone:
                with contextlib.suppress(RemoteError):
                    self._remove(self._base + name)

    def _remove(self, address: str) -> None:
        repeated(address, lambda: self._files.rm_file(address))

    def _put(self, name: str) -> None:
        address = self._base + name
        repeated(address, lambda: self._files.put_file(str(self._folder / name), address))

    def _here(self, whole: bool) -> Iterator[str]:
        for path in sorted(self._folder.rglob("*")):
            is_database = path.name.endswith((".db", "-journal", "-wal"))
            is_passing = path.suffix in (".tmp", ".part") or (path.name[0] == "." and ".lock" in path.name)
            if path.is_file() and not is_passing and (whole or not is_database):
                yield path.relative_to(self._folder).as_posix()

    def _keep(self) -> None:
        """Copies and gives signs of life until the job ends."""
        while not self._ended.wait(INTERVAL):
            try:
                self._beat()
                self.push(whole=False)
            except RemoteError as error:  # the next time, or the end, which says so
                print(f"note: {error}; it is tried again", file=sys.stderr)
            except FileNotFoundError:
                pass  # deleted since it was listed

    # The lock

    def _take_lock(self) -> None:
        while True:
            try:
                self._sign(mode="create")
            except RemoteError:
                there = self._holder()
                if there is None:
                    raise
                if there.get("owner") != self._owner["owner"]:  # else an answer was lost
                    self._require_dead(there)
                    self._remove(self._lock)
                    continue
            if (self._holder() or {}).get("owner") == self._owner["owner"]:
                return
            self._refuse(self._holder() or {})

    def _holder(self) -> dict[str, Any] | None:
        try:
            text = repeated(self._lock, lambda: self._files.cat_file(self._lock)).decode()
        except RemoteError:
            return None
        found: dict[str, Any] = parse_json(text, self._lock)
        return found

    def _require_dead(self, there: dict[str, Any]) -> None:
        """Raises an InputError when whoever holds the lock gives a sign of life."""
        if all(there.get(key) == self._owner[key] for key in ("host", "machine")):
            if runs_here(int(there["pid"])):
                self._refuse(there)
            return
        print(f"note: {self.address} is locked; is {_called(there)} alive? Waiting", file=sys.stderr)
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            time.sleep(PATIENCE / 20)
            now = self._holder()
            if now is None:
                return
            if now != there:
                self._refuse(now)

    def _refuse(self, there: dict[str, Any]) -> None:
        raise InputError(
            f"{self.address} is in use by {_called(there)}; wait until it has ended, or give another out="
        )

    def _beat(self) -> None:
        there = self._holder()
        if there is not None and there.get("owner") != self._owner["owner"]:
            self._lost = True
            self._ended.set()
            return
        self._owner["beat"] += 1
        self._sign()

    def _sign(self, **how: str) -> None:
        content = json.dumps(self._owner).encode()
        repeated(self._lock, lambda: self._files.pipe_file(self._lock, content, **how))


def _called(there: dict[str, Any]) -> str:
    return f"process {there.get('pid')} on {there.get('host')}"


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
