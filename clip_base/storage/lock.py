"""One process at a time in a run folder: a second one is refused, and a dead one's lock is free.

The lock is the operating system's, on a file in the folder: it ends with the process that holds it, however
that ended. A file beside it says who holds it, for the message.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from glob import escape
from pathlib import Path
from types import TracebackType
from typing import Any
from weakref import WeakValueDictionary

from filelock import FileLock, Timeout

from clip_base.runtime.errors import InputError
from clip_base.storage.files import make_folder, sweep, write_json

LOCK = ".lock"
_OWNER = ".json"  # the ending of the file that says who holds the lock


class OutputLock:
    """The lock of a job's output, held until `release`, a `with` statement's end, or the last reference's.

    Args:
        out: the output: a folder, or a file that need not be there yet.
        path: the lock's file, in an existing folder.

    Raises:
        InputError: another process writes there; its number and since when are told.
    """

    def __init__(self, out: Path, path: Path) -> None:
        self.out, self.path, self._process = out, path, os.getpid()
        self._lock = FileLock(self.path, timeout=0, thread_local=False)
        self._take(self._lock, self.path)
        try:
            self._require_no_others()
        except InputError:
            self._lock.release()
            raise
        owner = {"pid": self._process, "host": socket.gethostname(), "began": time.time()}
        with contextlib.suppress(OSError):
            write_json(_owner_file(self.path), owner)  # whole, whenever another process reads it

    def __enter__(self) -> OutputLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # half made, or while Python shuts down
            self.release()

    @property
    def is_held(self) -> bool:
        """Whether this process holds it; a forked one does not."""
        return self._process == os.getpid() and self._lock.is_locked

    def release(self) -> None:
        """Lets others in."""
        if self.is_held:
            for path in (_owner_file(self.path), self.path):
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
            self._lock.release()

    def _require_no_others(self) -> None:
        """Refuses a folder that is locked as a whole or in other parts; parts of one division go together."""
        count = _division(self.path)
        for path in self.out.glob(f"{LOCK}*"):
            if path != self.path and path.suffix != _OWNER and not (count and count == _division(path)):
                other = FileLock(path, timeout=0, thread_local=False)
                self._take(other, path)
                other.release()

    def _take(self, lock: FileLock, path: Path) -> None:
        while True:
            path.touch()
            try:
                before = path.stat().st_ino
                lock.acquire()
                # Whoever held it may have deleted the file meanwhile: then this is the lock of nothing.
                if path.stat().st_ino == before:
                    return
            except FileNotFoundError:
                pass
            except Timeout:
                raise InputError(
                    f"{self.out} is in use by {_owner(path)}; wait until it has ended, or give another out="
                ) from None
            lock.release()


_held: WeakValueDictionary[Path, OutputLock] = WeakValueDictionary()
_access = threading.Lock()


def lock_folder(folder: str | Path, part: str = "") -> OutputLock:
    """Makes the folder if there is none, and locks it; see `OutputLock`. This process may ask again.

    Args:
        folder: a job's output.
        part: which part of it this process writes, "K-of-N", beside processes that write others; "" for all.
    """
    folder = make_folder(folder)
    lock, is_new = _lock(folder, folder / (f"{LOCK}-{part}" if part else LOCK))
    if is_new and not part:  # beside other parts' processes, which may be on other machines, nothing is swept
        sweep(folder.rglob(".*.tmp"))
    return lock


def lock_file(file: str | Path) -> OutputLock:
    """Locks a file that a job writes, or a folder that is not only the job's, by a file beside it."""
    file = Path(file)
    parent = make_folder(file.parent)
    lock, is_new = _lock(file, file.with_name(f".{file.name}{LOCK}"))
    if is_new:
        sweep(parent.glob(f".{escape(file.name)}.*.tmp"))
        sweep(file.glob(".*.tmp"))
    return lock


def _lock(out: Path, path: Path) -> tuple[OutputLock, bool]:
    """Returns the lock, and whether this process has just got it."""
    key = path.parent.resolve() / path.name
    with _access:
        lock = _held.get(key)
        if lock is not None and lock.is_held:
            return lock, False
        lock = _held[key] = OutputLock(out, path)
        return lock, True


def _division(path: Path) -> str:
    """Returns N of a part's lock `.lock-K-of-N`; "" of a whole folder's."""
    return path.name.partition("-of-")[2]


@contextlib.contextmanager
def releasing_locks() -> Iterator[None]:
    """Releases at the end all locks that were taken meanwhile, also those that an error's traceback holds."""
    before = set(_held.values())
    try:
        yield
    finally:
        for lock in set(_held.values()) - before:
            lock.release()


def is_lock(path: Path) -> bool:
    """Whether a file is one of a lock's, which says nothing about a run."""
    return path.name == LOCK or path.name.startswith(
        (f"{LOCK}-", f"{LOCK}.", f".{LOCK}")
    )  # temporary ones, too


def _owner_file(path: Path) -> Path:
    return path.with_name(f"{path.name}{_OWNER}")


def _owner(path: Path) -> str:
    """Says who holds a lock."""
    try:
        owner: dict[str, Any] = json.loads(_owner_file(path).read_text(encoding="utf-8"))
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner["began"]))
        place = "" if owner["host"] == socket.gethostname() else f" on {owner['host']}"
        return f"process {owner['pid']}{place}, which started at {began}"
    except (OSError, ValueError, TypeError, LookupError, OverflowError):
        return "another process"
