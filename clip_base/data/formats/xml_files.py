"""XML files of annotations, opened in one place: what does not parse is one line that names the file."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from clip_base.runtime.errors import InputError, quote
from clip_base.storage.files import existing_file


def read_xml(path: Path) -> ElementTree.Element:
    """Returns a file's root element.

    Entities of the file's own are refused by the limits of the parser, expat, and external ones are not read.

    Raises:
        InputError: the file is missing or not well-formed; the place is named.
    """
    try:
        return ElementTree.parse(existing_file(path, "annotations file")).getroot()
    except ElementTree.ParseError as error:
        raise InputError(f"annotations file {path} is not well-formed XML: {error}") from None
    except OSError as error:
        raise InputError(f"annotations file {path} cannot be read: {error.strerror}") from None
    except (ValueError, LookupError) as error:  # an encoding that Python does not know
        raise InputError(f"annotations file {path} cannot be read: {error}") from None


def root_tag(path: Path) -> str:
    """Returns the name of a file's root element, "" when it is no XML file; reads its beginning only."""
    try:
        with path.open("rb") as file:
            for _, element in ElementTree.iterparse(file, events=("start",)):
                return str(element.tag)
    except (ElementTree.ParseError, OSError, ValueError, LookupError):
        pass
    return ""


def text_of(element: ElementTree.Element, key: str, place: str) -> str:
    """Returns the text of an element's child; InputError when there is none."""
    text = (element.findtext(key) or "").strip()
    if not text:
        raise InputError(f"{place} needs a <{key}>, found {quote(_shown(element))}")
    return text


def attribute_of(element: ElementTree.Element, key: str, place: str) -> str:
    """Returns an element's attribute; InputError when it is missing."""
    value = element.get(key)
    if value is None:
        raise InputError(f"{place} needs {key}=, found {quote(_shown(element))}")
    return value


def _shown(element: ElementTree.Element) -> str:
    return " ".join(ElementTree.tostring(element, encoding="unicode").split())
