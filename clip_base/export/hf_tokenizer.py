"""CLIP's tokenizer in the files of Hugging Face's `transformers` and `tokenizers`, with the same ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clip_base.models.tokenizer import spelled_vocabulary
from clip_base.storage.files import write_json, write_text

START, END = "<|startoftext|>", "<|endoftext|>"  # as those files spell the two last ids
PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def write_tokenizer(path: str | Path, context_length: int) -> None:
    """Writes `tokenizer.json`, which `tokenizers.Tokenizer.from_file` reads without PyTorch.

    It cuts texts to `context_length` ids and pads them with zeros to as many, as `clip_base.tokenize(…,
    truncate=True)` does. Broken Unicode and HTML entities, which that fixes first, stay as they are.
    """
    write_json(path, _pipeline(context_length))


def write_transformers_tokenizer(folder: Path, context_length: int) -> None:
    """Writes what transformers' CLIPTokenizer, slow or fast, of any version takes from a model's folder."""
    pipeline = _pipeline(context_length) | {"truncation": None, "padding": None}
    model = pipeline["model"]
    write_json(folder / "tokenizer.json", pipeline)
    write_json(folder / "vocab.json", model["vocab"])
    write_text(
        folder / "merges.txt", "\n".join(["#version: 0.2", *(" ".join(m) for m in model["merges"]), ""])
    )
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    write_json(folder / "special_tokens_map.json", special, indent=2)
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length, "do_lower_case": True}
    write_json(folder / "tokenizer_config.json", {**settings, **special}, indent=2)


def _pipeline(context_length: int) -> dict[str, Any]:
    """Returns the content of `tokenizer.json`: cleaning, cutting into pieces, merging, start and end."""
    pieces, merges = spelled_vocabulary()
    vocabulary = {piece: token for token, piece in enumerate([*pieces, START, END])}
    start, end = vocabulary[START], vocabulary[END]
    added = [
        {
            "id": token,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for content, token in ((START, start), (END, end))
    ]
    split = {"type": "Split", "pattern": {"Regex": PIECES}, "behavior": "Removed", "invert": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": {
            "direction": "Right",
            "max_length": context_length,
            "strategy": "LongestFirst",
            "stride": 0,
        },
        "padding": {
            "strategy": {"Fixed": context_length},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "!",
        },
        "added_tokens": added,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFC"},
                {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
                {"type": "Lowercase"},
            ],
        },
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": [END, end],
            "cls": [START, start],
            "trim_offsets": False,
            "add_prefix_space": False,
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": END,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [list(pair) for pair in merges],
        },
    }
