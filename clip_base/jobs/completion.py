"""What may stand next on the command line, for the shells' TAB: `eval "$(regionclip completion bash)"`.

The shell hands the words so far to `PROGRAM completion --words …` and gets a line for each word that may
take the place of the last one, with its meaning behind a tab; the line `:files` says that files may too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from importlib.metadata import EntryPoint
from importlib.resources import files
from itertools import pairwise
from typing import Any

from clip_base.jobs import config as configs
from clip_base.jobs import outline, plugins
from clip_base.runtime.errors import InputError

COMMAND = "completion"
SHELLS = ("bash", "zsh", "fish")
FILES = ":files"

Jobs = dict[str, EntryPoint]
Word = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class _Option:
    """One option of a job.

    Attributes:
        key: dotted, a part's name as `matcher.name`.
        meaning: one line.
        values: what it may be, with meanings; no end to it when there are none.
        is_flag: whether `--key` alone sets it.
        takes_file: whether its value may name a file.
    """

    key: str
    meaning: str
    values: tuple[Word, ...]
    is_flag: bool
    takes_file: bool


def completion(program: str, jobs: Jobs, arguments: Sequence[str]) -> str:
    """Returns the script that teaches a shell both commands; with `--words`, what may stand next.

    Args:
        program: the command's name, for the message.
        jobs: the command's jobs by the names that it lists.
        arguments: a shell's name; or `--words` and the words behind the command, the unfinished one last.

    Raises:
        InputError: no shell, or one without a script, was named.
    """
    if arguments[:1] == ["--words"]:
        lines = [f"{word}\t{meaning}" for word, meaning in next_words(jobs, arguments[1:] or [""])]
        return "\n".join(line.removesuffix("\t") for line in lines)
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        raise InputError(f"name one shell: {', '.join(SHELLS)}; {how(program, SHELLS[0])} in ~/.bashrc, say")
    script = files("clip_base") / "data_files" / f"completion.{arguments[0]}"
    return script.read_text(encoding="utf-8").rstrip("\n")


def how(program: str, shell: str) -> str:
    """Returns the line that a user types, or puts into the shell's startup file."""
    return (
        f"{program} {COMMAND} {shell} | source"
        if shell == "fish"
        else f'eval "$({program} {COMMAND} {shell})"'
    )


def next_words(jobs: Jobs, words: Sequence[str]) -> list[Word]:
    """Returns what may take the place of the last of `words`, with meanings; (FILES, "") for files."""
    *before, current = words
    if not before:
        found = [(name, plugins.summary(point)) for name, point in sorted(jobs.items())]
        found += [(COMMAND, "Prints the script that completes words on TAB, for a shell."), ("--help", "")]
    elif before[0] == COMMAND:
        found = [(shell, "") for shell in SHELLS] if len(before) == 1 else []
    elif before[0] in jobs:
        return _in_job(outline.describe(jobs[before[0]]).schema, before[1:], current)
    else:
        found = []
    return [word for word in found if word[0].startswith(current)]


def _in_job(schema: type, before: Sequence[str], current: str) -> list[Word]:
    given = _given(before)
    options = {option.key: option for option in _options(schema, given)}
    dashes = "--" if current.startswith("--") else ""
    key, equals, _ = current.removeprefix("--").partition("=")
    last = _key(before[-1]) if before and before[-1].startswith("--") and "=" not in before[-1] else ""
    if last in options and not options[last].is_flag:
        return _values(options[last], "", current)
    if equals:
        option = options.get(_key(key))
        return _values(option, f"{dashes}{key}=", current) if option else []
    found = dict(_keys([option for option in options.values() if option.key not in given], dashes, current))
    found |= {word: "" for word in ("--help", "--debug") if dashes and word.startswith(current)}
    positional = any(field.metadata.get("positional") for _, field, _ in configs.fields_of(schema))
    if not dashes and (positional or not found):  # pictures, weights; or the config file
        found[FILES] = ""
    return list(found.items())


def _key(word: str) -> str:
    return word.removeprefix("--").replace("-", "_")


def _given(words: Sequence[str]) -> dict[str, str]:
    """Returns the values of the options among the words, and under "" the config file's name."""
    given = {}
    for word, following in pairwise([*words, ""]):
        key, equals, value = word.partition("=")
        if equals or word.startswith("--"):
            given[_key(key)] = value if equals else following
        elif word.endswith((".yaml", ".yml")):
            given[""] = word
    return given


def _options(schema: type, given: dict[str, str], prefix: str = "") -> Iterator[_Option]:
    defaults = configs.defaults_of(schema)
    for key, field, hint in configs.fields_of(schema, prefix):
        if dataclasses.is_dataclass(hint):
            continue
        meaning, group = str(field.metadata.get("meaning", "")), field.metadata.get("group")
        if not group:
            values = _known_values(field, hint, defaults[key.removeprefix(prefix)])
            takes_file = hint in (str, list[str]) and not field.metadata.get("choices")
            yield _Option(key, meaning, values, hint is bool, takes_file)
            continue
        points = plugins.found(group)
        yield _Option(
            f"{key}.name",
            meaning,
            tuple((name, plugins.summary(points[name])) for name in points),
            False,
            False,
        )
        # A config file may name another part than the default one: then the options of all are offered.
        names = [given.get(f"{key}.name", defaults[key.removeprefix(prefix)]["name"])]
        for name in points if "" in given and f"{key}.name" not in given else names:
            if name in points:
                yield from _options(outline.describe(points[name]).schema, {}, f"{key}.")


def _known_values(field: dataclasses.Field[Any], hint: Any, default: Any) -> tuple[Word, ...]:
    """Returns the values an option may have, or its default alone, whose meaning is "default"."""
    shown = str(default).lower() if hint is bool else str(default)
    choices = field.metadata.get("choices") or (("true", "false") if hint is bool else ())
    if not choices and isinstance(default, int | float | str) and default != configs.REQUIRED:
        choices = (shown,)
    # One word each: others would have to be quoted, in each shell its way.
    return tuple((value, "default" if value == shown else "") for value in choices if len(value.split()) == 1)


def _values(option: _Option, prefix: str, current: str) -> list[Word]:
    found = [(f"{prefix}{value}", meaning) for value, meaning in option.values]
    found = [word for word in found if word[0].startswith(current)]
    return [*found, (FILES, "")] if option.takes_file else found


def _keys(options: Sequence[_Option], dashes: str, current: str) -> Iterator[Word]:
    """Yields `key=` for the options that `current` begins, `group.` for those in a group not yet named."""
    typed = current.removeprefix("--").replace("-", "_") if dashes else current
    for option in options:
        if not option.key.startswith(typed):
            continue
        rest = option.key[len(typed) :]
        group, dot, _ = rest.partition(".")
        if dot:
            yield f"{current}{group}.", "…"
        else:
            yield f"{current}{rest}{'' if dashes and option.is_flag else '='}", option.meaning
