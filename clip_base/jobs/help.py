"""The texts of `--help` and `--help-all`, 80 columns wide."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from clip_base.jobs import schema as schemas
from clip_base.jobs.schema import Description, Option
from clip_base.storage.limits import LIMITS

COLUMNS = 80
_KEYS = 26  # columns of an everyday option's name and default
_LONG_DEFAULT = 16


def job_help(command: str, job: Description, given: Mapping[str, str]) -> str:
    """Returns the text of `JOB --help`: what the job does, an example, and its everyday options by section.

    A job that declares none (see `everyday`) shows all of its options.

    Args:
        command: program and job.
        job: its description.
        given: options that stand on the command line as well; the part that one names shows its options.
    """
    if not job.sections:
        return job_help_all(command, job, given)
    options = {option.key: option for option in job.options}
    lines = _head(command, job)
    if job.example:
        lines += ["", "example:", *_command(f"{command.partition(' ')[0]} {job.example}")]
    for title, keys in job.sections.items():
        lines += ["", f"{title}:"]
        for key in keys:
            lines += _everyday(options[key])
    for option in job.options:
        if option.group and given.get(option.key, "none") != "none":
            lines += ["", f"{option.key}={given[option.key]}:"]
            for inner in _part(option, given[option.key]):
                lines += _everyday(inner)
    lines += ["", *_wrapped(f"--help-all lists all {len(job.options)} options, and those of parts.")]
    return "\n".join(lines)


def job_help_all(command: str, job: Description, given: Mapping[str, str]) -> str:
    """Returns the text of `JOB --help-all`: every option with type, default and meaning.

    Args:
        command: program and job.
        job: its description.
        given: see `job_help`; of a part that is not named the options of the default are shown.
    """
    lines = [*_head(command, job), "", "options:"]
    # Those that must be given come first.
    for option in sorted(job.options, key=lambda option: not option.required):
        lines += _entry(option)
        if option.group:
            lines += _faults(option)
            for inner in _part(option, given.get(option.key, str(option.default))):
                lines += _entry(inner)
    lines += ["", "options of every job:"]
    for limit in LIMITS:
        kind, default = ("bool", bool(limit.default)) if limit.is_flag else ("float", limit.default)
        lines += _indented(f"{limit.key} ({kind}, default {default!r})", limit.meaning)
    return "\n".join(lines)


def listed(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Returns (name, meaning) rows as lines of two columns."""
    width = max((len(name) for name, _ in rows), default=0) + 4
    lines = []
    for name, meaning in rows:
        first, *rest = _wrapped(meaning, COLUMNS - width) or [""]
        lines += [f"  {name:<{width - 2}}{first}".rstrip(), *(f"{'':{width}}{line}" for line in rest)]
    return lines


def named(name: str, meaning: str) -> list[str]:
    """Returns a name, and below it its meaning, indented, as lines."""
    return [name, *(f"    {line}" for line in _wrapped(meaning, COLUMNS - 4))]


def _head(command: str, job: Description) -> list[str]:
    """Returns how the job is called, and what it does."""
    needed = [option for option in job.options if option.required]
    words = [
        f"{option.key.upper()}{'…' if option.kind.startswith('list') else ''}"
        if option.positional
        else f"{option.key}=…"
        for option in sorted(needed, key=lambda option: not option.positional)
    ]
    usage = " ".join(["usage:", command, *words, "[FILE.yaml] [key=value …]"])
    paragraphs = job.text.partition("\n\nRaises:")[0].split("\n\n")
    lines = textwrap.wrap(usage, COLUMNS, subsequent_indent="  ")
    for paragraph in paragraphs:
        lines += ["", *_wrapped(" ".join(paragraph.split()))]
    return lines


def _command(text: str) -> list[str]:
    """Returns a command as lines that a shell takes."""
    lines = [""]
    for word in re.findall(r'(?:[^\s"]|"[^"]*")+', text):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > COLUMNS - 6:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    ends = [" \\"] * (len(lines) - 1) + [""]
    return [
        f"{'    ' if n else '  '}{line}{end}" for n, (line, end) in enumerate(zip(lines, ends, strict=True))
    ]


def _everyday(option: Option) -> list[str]:
    left = f"{option.key}={_default(option)}"
    notes = ["required"] if option.required else []
    if option.group:
        notes.append(_either(schemas.plugins_of(option.group)))
        notes.append(f"{option.key}=NAME --help shows that part's options")
    notes += [_either(option.choices)] if option.choices else []
    meaning = option.meaning + (f" ({'; '.join(notes)})" if notes else "")
    lines = _wrapped(meaning, COLUMNS - _KEYS - 2)
    start = f"  {left:<{_KEYS}}"
    if len(left) >= _KEYS:
        return [f"  {left}", *(f"{'':{_KEYS + 2}}{line}" for line in lines)]
    return [start + lines[0], *(f"{'':{_KEYS + 2}}{line}" for line in lines[1:])]


def _default(option: Option) -> str:
    """Returns a default as it would be typed; what would be long is left out."""
    if option.required:
        return "…"
    value = option.default
    if isinstance(value, str):
        text = value or '""'
    elif isinstance(value, list):
        text = ",".join(item if isinstance(item, str) else json.dumps(item) for item in value) or '""'
    else:
        text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _LONG_DEFAULT or isinstance(value, str) else "…"


def _entry(option: Option) -> list[str]:
    kind = "|".join(option.choices) or option.kind
    shown = "required" if option.required else f"default {option.default!r}"
    meaning = option.meaning
    if option.group:
        known = ", ".join(schemas.plugins_of(option.group))
        kind, shown = "plugin", f"default {option.default}; known: {known}"
        meaning += f"; with {option.key}=NAME before --help-all, that part's options are listed"
    return _indented(f"{option.key} ({kind}, {shown})", meaning)


def _indented(left: str, meaning: str) -> list[str]:
    lines = textwrap.wrap(left, COLUMNS - 2, subsequent_indent="    ", break_long_words=False)
    return [f"  {line}" for line in lines] + [f"      {line}" for line in _wrapped(meaning, COLUMNS - 6)]


def _faults(option: Option) -> Iterator[str]:
    """Yields lines that say why parts cannot be imported, for those that cannot."""
    for name, known in schemas.plugins_of(option.group).items():
        if known.fault:
            yield from _indented(f"{option.key}={name}", f"[{name}] {known.fault}")


def _part(option: Option, name: str) -> Iterator[Option]:
    """Yields the options of the part `name`, with whole keys."""
    known = schemas.plugins_of(option.group)
    if name not in known:
        return
    prefix = option.key.removesuffix("name")
    for inner in known[name].options:
        yield _renamed(inner, f"{prefix}{inner.key}", f"[{name}] {inner.meaning}")


def _renamed(option: Option, key: str, meaning: str) -> Option:
    values: dict[str, Any] = {**vars(option), "key": key, "meaning": meaning}
    return Option(**values)


def _either(names: Iterable[str]) -> str:
    """Returns names with bars between them; of many, with spaces too, so that a line can end there."""
    text = "|".join(names)
    return text if len(text) < COLUMNS // 2 else text.replace("|", " | ")


def _wrapped(text: str, width: int = COLUMNS) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
