"""The job `inspect`: what a weights file contains, and whether it is complete."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from clip_base.jobs.everyday import everyday
from clip_base.models.configs import CLIPConfig
from clip_base.runtime.errors import InputError
from clip_base.storage.hashing import file_hash
from clip_base.weights import formats, native
from clip_base.weights.fetching import download
from clip_base.weights.load import WeightsFile, find
from clip_base.weights.native import read_weights, require_finite
from clip_base.weights.reading import FRAMEWORKS, is_safetensors, read_clip, read_foreign


@everyday(
    "inspect RN50",
    input="file",
    model="activation",
)
@dataclass
class InspectConfig(WeightsFile):
    """Options of `inspect`."""


def inspect(config: InspectConfig) -> None:
    """Shows the content of a weights file: format, towers, parameters; fails unless known and complete."""
    path = find(config.file)
    other = _metadata_of_another_form(path)
    if other is not None:
        rows = _rows_of_parts(path, *other)
    else:
        content = read_foreign(path)
        rows = _rows_of_content(path, content, config.activation) if content is not None else []
        rows = rows or _rows_of_clip(path, config.activation)
    table = Table("", "", title=str(path), title_justify="left", show_header=False)
    for left, right in rows:
        table.add_row(left, right)
    Console(highlight=False, markup=False).print(table)


def _rows_of_clip(path: Path, activation: str) -> list[tuple[str, str]]:
    _, report = read_clip(path, activation, precision="stored")
    vision, text = _towers(report.config)
    return [
        ("form", report.form),
        ("file", f"{report.path.stat().st_size / 2**20:,.1f} MiB"),
        ("image tower", vision),
        ("text tower", text),
        ("embedding", f"{report.config.embed_dim} numbers"),
        ("activation", report.config.activation),
        ("parameters", f"{report.parameters:,} in {report.tensors} tensors"),
        ("precision", ", ".join(f"{kind}: {count:,}" for kind, count in sorted(report.precision.items()))),
        ("same sizes as", ", ".join(report.matches) or "none of the published models"),
        ("published file", _published_name(report.path)),
        ("whole", "yes: every tensor is there, fits and is finite, none is left over"),
        *(("note", note) for note in report.notes),
    ]


def _rows_of_content(path: Path, content: formats.Content, activation: str) -> list[tuple[str, str]]:
    """Returns the rows of a file of another package's form: each group of tensors and what it is for."""
    for group in content.groups:
        require_finite(group.state, path)
    if content.check is not None:
        content.check(content, path)
    if content.clip is not None:
        rows = _rows_of_clip(path, activation)
    else:
        rows = [
            ("form", content.form),
            ("file", f"{path.stat().st_size / 2**20:,.1f} MiB"),
            ("published file", _published_name(path)),
            ("whole", "yes: every tensor has its purpose and is finite, none is left over"),
            *(("note", note) for note in content.notes),
        ]
    known = [row for row in rows if not row[1].startswith("not needed:")]
    return known + [
        (
            group.name if group.used else f"{group.name} (not needed)",
            f"{group.numbers:,} numbers in {len(group.state)} tensors: {group.purpose}",
        )
        for group in content.groups
    ]


def _towers(config: CLIPConfig) -> tuple[str, str]:
    vision, text = config.vision, config.text
    layers = "-".join(map(str, vision.layers))
    shape = f"width {vision.width}, {vision.heads} heads, {vision.resolution} pixels square"
    if vision.kind == "resnet":
        first = f"ResNet, blocks {layers}, {shape}"
    else:
        first = f"ViT, {layers} blocks, patches of {vision.patch}, {shape}"
    second = f"{text.layers} blocks, width {text.width}, {text.heads} heads, "
    if text.kind == "bow":
        second = f"mean of token embeddings, width {text.width}, "
    return first, second + f"{text.context_length} positions, {text.vocab_size:,} ids"


def _published_name(path: Path) -> str:
    """Says which published file this is, by its checksum or, where none is known, by its name."""
    known = download.files()
    name = download.recognize(file_hash(path))
    if name is not None:
        owner = "OpenAI's " if name in download.FILES else ""
        return f"yes: {owner}{name}, sha256 equal"
    named = next((key for key, file in known.items() if not file.sha256 and file.name == path.name), None)
    if named is not None:
        return f"it has the name of {named}; that file's checksum is not published"
    return "no, its sha256 is not among them"


def _metadata_of_another_form(path: Path) -> tuple[dict[str, str], dict[str, Any]] | None:
    """Returns the metadata and tensors of a safetensors file that names another form than a CLIP's."""
    if not is_safetensors(path):
        return None
    weights, metadata = read_weights(path)
    form = metadata.get("format", "")
    return None if not form or form in (native.FORMAT, *FRAMEWORKS) else (metadata, weights)


def _rows_of_parts(path: Path, metadata: dict[str, str], weights: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns the rows of a file whose metadata states its format and sizes."""
    if not weights:
        raise InputError(f"{path} names the form {metadata['format']!r} but holds no tensors; write it again")
    require_finite(weights, path)
    precision: Counter[str] = Counter()
    parts: Counter[str] = Counter()
    for name, value in weights.items():
        precision[str(value.dtype).removeprefix("torch.")] += value.numel()
        parts[name.partition(".")[0]] += value.numel()
    try:
        described = native.describe(metadata)
    except json.JSONDecodeError as error:
        raise InputError(
            f"the metadata of {path} are not valid JSON ({error.msg}); write the file again"
        ) from None
    rows = [("form", metadata["format"]), ("file", f"{path.stat().st_size / 2**20:,.1f} MiB")]
    rows += [(key, _shown(value)) for key, value in sorted(described.items()) if key != "format"]
    rows += [
        ("numbers", f"{sum(parts.values()):,} in {len(weights)} tensors"),
        ("parts", ", ".join(f"{part}: {count:,}" for part, count in parts.most_common(12))),
        ("precision", ", ".join(f"{kind}: {count:,}" for kind, count in sorted(precision.items()))),
        ("whole", "yes: every tensor in its index is there and finite"),
    ]
    return rows


def _shown(value: Any, indent: str = "") -> str:
    """Returns a config as `key: value` lines, a long list by its beginning."""
    if isinstance(value, dict):
        parts = []
        for key, inner in value.items():
            nested = isinstance(inner, dict)
            parts.append(f"{indent}{key}:{chr(10) if nested else ' '}{_shown(inner, indent + '  ')}")
        return "\n".join(parts)
    if isinstance(value, list) and len(value) > 12:
        return f"{', '.join(map(str, value[:12]))}, … ({len(value)} in all)"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
