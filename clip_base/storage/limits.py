"""How much a file may ask for, and where the names in it may lead; options of every job raise the limits.

A few bytes can declare a picture of a billion pixels or an archive that unpacks to any size, and a list of
images can name any file of the machine. What a file declares is compared with these limits before anything is
allocated or opened. They are kept in environment variables, so that workers have those of the command.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from clip_base.runtime.errors import InputError, quote


@dataclass(frozen=True)
class Limit:
    """A limit that every job has.

    Attributes:
        key: the option, as in `key=value` and, with dashes, `--key value`.
        default: its value; 0: what it names is refused, 1: it is allowed.
        meaning: one line.
        is_flag: whether it is refused or allowed, not a number.
    """

    key: str
    default: float
    meaning: str
    is_flag: bool = False

    @property
    def variable(self) -> str:
        """The environment variable that holds it, for Python and for workers."""
        return f"REGIONCLIP_{self.key.upper()}"

    @property
    def option(self) -> str:
        """The option as it is typed."""
        return f"--{self.key.replace('_', '-')}"

    @property
    def value(self) -> float:
        """The limit in force; InputError when the environment variable holds no such value."""
        text = os.environ.get(self.variable, "")
        return self.parse(text, f"the environment variable {self.variable}") if text else self.default

    def parse(self, text: str, where: str) -> float:
        """Returns the limit that a text states; InputError, which begins with `where`, for another text."""
        if self.is_flag:
            known = {"true": 1.0, "1": 1.0, "false": 0.0, "0": 0.0}
            if text.lower() not in known:
                raise InputError(f"{where} must be true or false, found {quote(text)}")
            return known[text.lower()]
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf"):
            raise InputError(f"{where} must be a positive number, found {quote(text)}")
        return value


# Pillow's own limit of pixels; the largest published CLIP has 4 GB of weights, LVIS's annotations 1 GB.
MEGAPIXELS = Limit("max_megapixels", 178.0, "million pixels that an image file may declare")
UNPACKED_GB = Limit("max_unpacked_gb", 20.0, "10⁹ bytes that an archive, or the tensors in it, may unpack to")
OUTSIDE_IMAGES = Limit(
    "outside_images", 0.0, "whether file names in data may lead out of the folder of images", is_flag=True
)
LIMITS = (MEGAPIXELS, UNPACKED_GB, OUTSIDE_IMAGES)
_HARMLESS = 1e8  # bytes that may be unpacked of anything
_USUAL = 100  # times its size: the most that texts and weights are packed; zeros are packed a thousand times


def split_limits(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Returns a command's other arguments, and the environment variables of the limits among them.

    Raises:
        InputError: a limit has no value, or none that it may have.
    """
    known, rest = {limit.key: limit for limit in LIMITS}, list[str]()
    found: dict[str, str] = {}
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        key, equals, text = argument.removeprefix("--").partition("=")
        limit = known.get(key.replace("-", "_")) if equals or argument.startswith("--") else None
        if limit is None:
            rest.append(argument)
            continue
        if not equals and limit.is_flag and not (queue and queue[0].lower() in ("true", "false")):
            text = "true"
        elif not equals and queue:
            text = queue.pop(0)
        found[limit.variable] = f"{limit.parse(text, limit.option):g}"
    return rest, found


@contextlib.contextmanager
def limits_set(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets the environment variables of limits, which the processes started meanwhile inherit."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, text in before.items():
            if text is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = text


def require_unpacked(size: float, packed: float, where: str) -> None:
    """Raises an InputError when content unpacks to more bytes than the limit, or than its size makes likely.

    Args:
        size: bytes that it unpacks to, as declared or so far.
        packed: bytes that it takes.
        where: names the file.
    """
    if size > UNPACKED_GB.value * 1e9:
        raise InputError(
            f"{where} unpacks to {size / 1e9:,.1f} GB, more than the {UNPACKED_GB.value:g} GB that are "
            f"allowed; if you trust it, raise {UNPACKED_GB.option}"
        )
    if size > _HARMLESS and size > _USUAL * packed:
        raise InputError(
            f"{where} takes {packed / 1e6:,.1f} MB and unpacks to more than {size / 1e6:,.0f} MB, as no data "
            "does; unpack it yourself if you trust it"
        )
