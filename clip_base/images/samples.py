"""Sample photographs that come with the package: `sample:cat` is the path of one of them."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from clip_base.runtime.errors import InputError

SCHEME = "sample:"
NAMES = ("astronaut", "cat", "coffee")


def located(image: str | Path) -> Path:
    """Returns the path of an image; of `sample:NAME`, where no file is called so, that of the sample.

    Raises:
        InputError: there is no such sample.
    """
    path, text = Path(image), str(image)
    if not text.startswith(SCHEME) or path.exists():
        return path
    name = text.removeprefix(SCHEME)
    if name not in NAMES:
        known = ", ".join(f"{SCHEME}{one}" for one in NAMES)
        raise InputError(f"there is no sample image {name!r}; the samples are {known}")
    return Path(str(files("clip_base") / "data_files" / "samples" / f"{name}.jpg"))
