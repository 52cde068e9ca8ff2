"""Tables and YAML as people write them: each format is opened in one function, whoever reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from clip_base.errors import InputError
from clip_base.files import read_text


def read_yaml(path: str | Path, what: str = "YAML file") -> Any:
    """Returns what a YAML file holds as OmegaConf's containers; a key that stands twice is an error.

    Raises:
        InputError: the file is missing, not UTF-8, or not valid YAML.
    """
    text = read_text(path, what)
    try:
        return OmegaConf.create(text)
    # OmegaConf passes on the errors of the parser, of its grammar, and of conversions to numbers and dates.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{what} {path} is not valid YAML: {reason:.200}") from None
