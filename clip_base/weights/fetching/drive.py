"""Files of a shared Google Drive folder: fetched by gdown where it is installed, else by people."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from filelock import FileLock

from clip_base.runtime.errors import InputError
from clip_base.runtime.progress import Progress
from clip_base.storage.files import make_folder, write_text
from clip_base.storage.hashing import file_hash
from clip_base.weights.fetching.published import MIB, Published, length


def fetch(file: Published, folder: Path) -> Path:
    """Returns a file of a shared folder, fetched unless it is here, in its folders or without them.

    Args:
        file: with the folder's address as its `page`.
        folder: where published files are kept.

    Raises:
        InputError: it cannot be fetched, and what to do by hand; or it is not the file that it should be.
    """
    target = folder / file.url
    kept = file.kept_in(folder)
    if kept is not None:
        _verify(file, kept)
        return kept
    try:
        _fetch_from_drive(file, target)
    except InputError:
        raise
    except Exception as error:  # of gdown, of the network below it, of the disk
        raise _only_by_hand(file, target, f"it cannot be fetched ({_reason(error)})") from None
    return target


def _verify(file: Published, place: Path) -> None:
    """Compares a file with its published checksum, else with what was kept when it was fetched."""
    kept = place.with_name(f"{place.name}.sha256")
    wanted = file.sha256 or (kept.read_text(encoding="utf-8").split()[0] if kept.is_file() else "")
    if not wanted:
        print(f"note: {place} cannot be verified because its publishers give no checksum", file=sys.stderr)
    elif file_hash(place) != wanted:
        origin = "the published file" if file.sha256 else "what was fetched first"
        raise InputError(f"{place} is not {origin}: its sha256 is not {wanted}")


def _fetch_from_drive(file: Published, target: Path) -> None:
    """Fetches a file of a shared folder by gdown, resumes a cut download, and keeps its sha256 beside it."""
    try:
        import gdown  # noqa: PLC0415 (optional)
    except ImportError:
        reason = "it is missing (pip install 'regionclip[hub]' fetches it from there)"
        raise _only_by_hand(file, target, reason) from None
    make_folder(target.parent)
    with FileLock(target.parent / f".{file.name}.lock"):
        if target.is_file():  # another process was first
            return
        print(f"fetching {file.url} from {file.page}", file=sys.stderr, flush=True)
        listed = gdown.download_folder(url=file.page, skip_download=True, quiet=True) or []
        place = next((one for one in listed if Path(one.path).as_posix().endswith(file.url)), None)
        if place is None:
            raise _only_by_hand(file, target, f"it is not among the {len(listed)} files that are listed")
        part = target.with_name(f"{target.name}.part")
        with _Watch(file.name) as watch:
            gdown.download(id=place.id, output=str(part), resume=True, quiet=True, progress=watch)
        if length(part) == 0:
            raise OSError("nothing arrived")
        if file.sha256 and file_hash(part) != file.sha256:
            raise OSError("what arrived has another sha256")
        write_text(target.with_name(f"{target.name}.sha256"), f"{file_hash(part)}  {file.name}\n")
        part.replace(target)


class _Watch:
    """Shows how far a download is, and how large the file is as soon as the server has told it."""

    def __init__(self, name: str) -> None:
        self.name, self.shown = name, contextlib.ExitStack()
        self.progress: Progress | None = None

    def __enter__(self) -> _Watch:
        return self

    def __call__(self, done: int, total: int | None) -> None:
        if self.progress is None:
            if total and not sys.stderr.isatty():  # a bar shows it
                print(f"{self.name}: {total / MIB:,.0f} MiB", file=sys.stderr, flush=True)
            begun = Progress(f"{self.name} (MiB)", -(-total // MIB) if total else None, done // MIB)
            self.progress = self.shown.enter_context(begun)
        self.progress.advance(done // MIB - self.progress.done)

    def __exit__(self, *_: object) -> None:
        self.shown.close()


def _reason(error: Exception) -> str:
    if "ConnectionError" in {kind.__name__ for kind in type(error).__mro__}:
        return "the server cannot be reached"
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:150]


def _only_by_hand(file: Published, target: Path, reason: str) -> InputError:
    return InputError(
        f"{file.name}: {reason}; get {file.url} from {file.page} with a browser and put it at {target}, "
        "or set CLIP_BASE_CACHE to its folder"
        + ("" if file.sha256 else " (its publishers give no checksum, so that it cannot be verified)")
    )
