"""How much a file may ask for before it is opened; environment variables raise the limits.

A few bytes can declare a picture of a billion pixels or an archive that unpacks to any size. What a header
declares is compared with these limits before anything is allocated.
"""

from __future__ import annotations

import os

from clip_base.runtime.errors import InputError, quote

MEGAPIXELS = "REGIONCLIP_MAX_MEGAPIXELS"
UNPACKED_GB = "REGIONCLIP_MAX_UNPACKED_GB"
# Pillow's own limit of pixels; the largest published CLIP has 4 GB of weights, LVIS's annotations 1 GB.
_HARMLESS = 1e8  # bytes that may be unpacked of anything
_USUAL = 100  # times its size: the most that texts and weights are packed; zeros are packed a thousand times
_DEFAULTS = {MEGAPIXELS: 178.0, UNPACKED_GB: 20.0}


def limit(name: str) -> float:
    """Returns a limit: MEGAPIXELS, million pixels of an image, or UNPACKED_GB, 10⁹ bytes of unpacked content.

    Raises:
        InputError: the environment variable of that name is no positive number.
    """
    text = os.environ.get(name, "")
    if not text:
        return _DEFAULTS[name]
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise InputError(f"the environment variable {name} must be a positive number, found {quote(text)}")
    return value


def require_unpacked(size: float, packed: float, where: str) -> None:
    """Raises an InputError when content unpacks to more bytes than the limit, or than its size makes likely.

    Args:
        size: bytes that it unpacks to, as declared or so far.
        packed: bytes that it takes.
        where: names the file.
    """
    if size > limit(UNPACKED_GB) * 1e9:
        raise InputError(
            f"{where} unpacks to {size / 1e9:,.1f} GB, more than the {limit(UNPACKED_GB):g} GB that are "
            f"allowed; if you trust it, set the environment variable {UNPACKED_GB}"
        )
    if size > _HARMLESS and size > _USUAL * packed:
        raise InputError(
            f"{where} takes {packed / 1e6:,.1f} MB and unpacks to more than {size / 1e6:,.0f} MB, as no data "
            "does; unpack it yourself if you trust it"
        )
