"""Published files by name: addresses, checksums and downloads.

OpenAI's nine are listed here; their addresses and checksums are those in openai/CLIP's `clip/clip.py`, where
the checksum is the folder of each file. Other packages declare tables of theirs, name -> `Published`:

    [project.entry-points."clip_base.published"]
    regionclip = "regionclip.checkpoints.zoo:FILES"
"""

from __future__ import annotations

import sys
from pathlib import Path

from filelock import FileLock

from clip_base.jobs import plugins
from clip_base.runtime.errors import InputError
from clip_base.storage.files import make_folder
from clip_base.storage.hashing import file_hash
from clip_base.storage.remote import TIMEOUT, RemoteError, RemoteFile
from clip_base.storage.remote_cache import cache_folder, receive
from clip_base.weights.fetching import drive
from clip_base.weights.fetching.published import Published, length

GROUP = "clip_base.published"
_BASE = "https://openaipublic.azureedge.net/clip/models"


def _file(name: str, sha256: str, size: int) -> Published:
    return Published(f"{_BASE}/{sha256}/{name}", sha256, size)


FILES = {
    "RN50": _file("RN50.pt", "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762", 255827503),
    "RN101": _file("RN101.pt", "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599", 291791292),
    "RN50x4": _file(
        "RN50x4.pt", "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd", 421854225
    ),
    "RN50x16": _file(
        "RN50x16.pt", "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa", 661125706
    ),
    "RN50x64": _file(
        "RN50x64.pt", "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c", 1353500174
    ),
    "ViT-B/32": _file(
        "ViT-B-32.pt", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", 353976522
    ),
    "ViT-B/16": _file(
        "ViT-B-16.pt", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f", 350837078
    ),
    "ViT-L/14": _file(
        "ViT-L-14.pt", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836", 932768134
    ),
    "ViT-L/14@336px": _file(
        "ViT-L-14-336px.pt", "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02", 934088680
    ),
}


def files() -> dict[str, Published]:
    """Returns every published file by name: OpenAI's, then those that other packages declare."""
    every = dict(FILES)
    for name in plugins.found(GROUP):
        every |= plugins.load(GROUP, name)
    return every


def fetch(name: str, folder: str | Path | None = None) -> Path:
    """Returns the published file called `name`, downloaded and checked when it is not there yet.

    Raises:
        InputError: there is no such file, or it cannot be had; the message says where to put it by hand.
    """
    known = files()
    if name not in known:
        raise InputError(f"{name!r} is not a published file; {plugins.did_you_mean(name, list(known))}")
    folder = Path(folder) if folder is not None else cache_folder()
    return drive.fetch(known[name], folder) if known[name].page else download(known[name], folder)


def recognize(sha256: str) -> str | None:
    """Returns the name of the published file that has this checksum."""
    return next((name for name, file in files().items() if file.sha256 == sha256), None)


def download(file: Published, folder: Path, timeout: float = TIMEOUT, pause: float | None = None) -> Path:
    """Returns `folder / file.name`, which has the right content; downloads it when it has not.

    What arrives goes to `NAME.part`, and a later call resumes where an earlier one was cut off. The file is
    renamed to its name only after its checksum was found right. Processes that want the same file wait for
    one of them.

    Args:
        file: what to get.
        folder: made when it does not exist.
        timeout: seconds without a byte after which the connection is closed and reopened.
        pause: seconds before the second attempt, doubled each time; None: see `RemoteFile`.

    Raises:
        InputError: the server cannot be reached, refuses, or sends other content; or the disk is full.
    """
    target, part = folder / file.name, folder / f"{file.name}.part"
    try:
        make_folder(folder)
        with FileLock(folder / f".{file.name}.lock"):
            if target.is_file():
                if file_hash(target) == file.sha256:
                    return target
                print(f"{target} is not the published file; downloading it again", file=sys.stderr)
            for _ in range(2):  # once more from the beginning when what came was wrong
                with RemoteFile(file.url, length(part), timeout, pause) as source:
                    receive(source, part)
                if file_hash(part) == file.sha256:
                    part.replace(target)
                    return target
                part.unlink()
    except RemoteError as error:
        raise _unavailable(file, target, error.reason) from None
    except OSError as error:
        raise _unavailable(file, target, str(error)) from None
    raise _unavailable(file, target, "what arrives has another sha256")


def _unavailable(file: Published, target: Path, reason: str) -> InputError:
    return InputError(
        f"{file.name} cannot be downloaded ({reason}); get {file.url} in another way, put it at {target} "
        f"(sha256 {file.sha256}), or set CLIP_BASE_CACHE to its folder"
    )
