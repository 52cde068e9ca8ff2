"""Completion of the command line in shells: `eval "$(regionclip completion bash)"`.

The shell hands the words so far to `PROGRAM completion --words …` and gets a line for each word that may
take the place of the last one, with its meaning behind a tab; the line `:files` says that files may too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from importlib.metadata import EntryPoint
from importlib.resources import files
from itertools import pairwise

from clip_base.jobs import plugins
from clip_base.jobs import schema as schemas
from clip_base.jobs.schema import Description, Option
from clip_base.runtime.errors import InputError
from clip_base.storage.limits import LIMITS

COMMAND = "completion"
SHELLS = ("bash", "zsh", "fish")
FILES = ":files"
LIMIT_WORDS = tuple(f"{limit.option}{'' if limit.is_flag else '='}" for limit in LIMITS)
EVERYWHERE = ("--help", "--help-all", "--debug", *LIMIT_WORDS)

Jobs = dict[str, EntryPoint]
Word = tuple[str, str]


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
        raise InputError(f"give one shell: {', '.join(SHELLS)}; {how(program, SHELLS[0])} in ~/.bashrc, say")
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
        return _in_job(schemas.describe(jobs[before[0]]), before[1:], current)
    else:
        found = []
    return [word for word in found if word[0].startswith(current)]


def _in_job(job: Description, before: Sequence[str], current: str) -> list[Word]:
    typed = given(before)
    options = {option.key: option for option in _options(job, typed)}
    dashes = "--" if current.startswith("--") else ""
    key, equals, _ = current.removeprefix("--").partition("=")
    last = _key(before[-1]) if before and before[-1].startswith("--") and "=" not in before[-1] else ""
    if last in options and options[last].kind != "bool":
        return _values(options[last], "", current)
    if equals:
        option = options.get(_key(key))
        return _values(option, f"{dashes}{key}=", current) if option else []
    found = dict(_keys([option for option in options.values() if option.key not in typed], dashes, current))
    found |= {
        word: ""
        for word in ("--help", "--help-all", "--debug", *LIMIT_WORDS)
        if dashes and word.startswith(current)
    }
    positional = any(option.positional for option in job.options)
    if not dashes and (positional or not found):  # images, weights; or the config file
        found[FILES] = ""
    return list(found.items())


def _key(word: str) -> str:
    return word.removeprefix("--").replace("-", "_")


def given(words: Sequence[str]) -> dict[str, str]:
    """Returns the values of the options among the words, and under "" the config file's name."""
    found = {}
    for word, following in pairwise([*words, ""]):
        key, equals, value = word.partition("=")
        if equals or word.startswith("--"):
            found[_key(key)] = value if equals else following
        elif word.endswith((".yaml", ".yml")):
            found[""] = word
    return found


def _options(described: Description, given: dict[str, str], prefix: str = "") -> Iterator[Option]:
    for option in described.options:
        yield dataclasses.replace(option, key=f"{prefix}{option.key}")
        known = schemas.plugins_of(option.group) if option.group else {}
        # A config file may name another plugin than the default one: then the options of all are offered.
        named = known if "" in given and option.key not in given else [given.get(option.key, option.default)]
        for name in named if known else ():
            if name in known:
                yield from _options(known[name], {}, f"{prefix}{option.key.removesuffix('name')}")


def _values(option: Option, prefix: str, current: str) -> list[Word]:
    """Returns what an option may be, as far as that is known: its choices, or its default."""
    default = str(option.default).lower() if option.kind == "bool" else str(option.default)
    values = option.choices or (["true", "false"] if option.kind == "bool" else [])
    takes_file = option.kind in ("str", "list[str]") and not values and not option.group
    if not values and isinstance(option.default, int | float | str) and not option.required:
        values = [default]
    # One word each: others would have to be quoted, in each shell its way.
    words = {value: "default" if value == default else "" for value in values if len(value.split()) == 1}
    if option.group:
        words = {name: known.summary for name, known in schemas.plugins_of(option.group).items()}
    found = [(f"{prefix}{value}", meaning) for value, meaning in words.items()]
    return [word for word in found if word[0].startswith(current)] + [(FILES, "")] * takes_file


def _keys(options: Sequence[Option], dashes: str, current: str) -> Iterator[Word]:
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
            yield f"{current}{rest}{'' if dashes and option.kind == 'bool' else '='}", option.meaning
