"""What pages are made of: Jinja2 templates whose values are escaped, and images inside the page."""

from __future__ import annotations

import base64
import io
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image


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
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
