"""What pages are made of: Jinja2 templates whose values are escaped, and images inside the page."""

from __future__ import annotations

import base64
import io
from functools import cache
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@cache
def page_environment(package: str) -> Environment:
    """Returns the templates in a package's folder `templates`; a name that is not given is an error."""
    return Environment(
        loader=PackageLoader(package),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def data_uri(image: Image.Image, quality: int = 84) -> str:
    """Returns an image as a JPEG inside a `data:` address."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=quality, optimize=True)
    return _address("jpeg", buffer.getvalue())


def png_uri(data: bytes) -> str:
    """Returns the content of a PNG file as a `data:` address."""
    return _address("png", data)


def figure_png(figure: Figure) -> bytes:
    """Returns a figure of matplotlib as a PNG; equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _address(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64," + base64.b64encode(data).decode("ascii")
