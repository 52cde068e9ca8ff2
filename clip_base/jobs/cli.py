"""The command line of every job: `clip-base JOB [FILE.yaml] [key=value …]`.

`key=value`, `--key value` and `--key=value` are the same thing. A bad call ends with one line and exit
code 2, a job that fails with one line and exit code 1; `--debug` shows the traceback.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from clip_base.jobs import completion as completions
from clip_base.jobs import config as configs
from clip_base.jobs import help as helps
from clip_base.jobs import plugins, remote_out, shipped
from clip_base.jobs import schema as schemas
from clip_base.jobs.familiar import HERE
from clip_base.runtime.announce import announced
from clip_base.runtime.errors import InputError, InputNote
from clip_base.runtime.lazy import installed_version
from clip_base.storage.limits import limits_set, split_limits
from clip_base.storage.lock import releasing_locks

REGION_PREFIX = "region-"
_LACK_OF_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk is full",
    errno.EFBIG: "the largest size of a file (ulimit -f) is reached",
}
CONFIGS, HELP_ALL = "configs", "--help-all"

# OpenMP threads that spin while they wait bring a shared machine to a standstill: two jobs beside each other
# then run forty times slower, not twice. Set before torch is imported, which reads it once.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `clip-base`; returns the exit code."""
    return _run("clip-base", "", sys.argv[1:] if arguments is None else list(arguments))


def main_regionclip(arguments: Sequence[str] | None = None) -> int:
    """Runs `regionclip`, which lists the region jobs without their prefix; returns the exit code."""
    return _run("regionclip", REGION_PREFIX, sys.argv[1:] if arguments is None else list(arguments))


def _run(program: str, prefix: str, arguments: list[str]) -> int:
    debug = "--debug" in arguments
    if arguments[:1] != [completions.COMMAND]:  # there it is a word that was typed
        arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        is_completion = arguments[:1] == [completions.COMMAND]
        arguments, limits = (arguments, {}) if is_completion else split_limits(arguments)
        with notes_as_lines(), _terminable(), releasing_locks(), limits_set(limits):
            code = _dispatch(program, prefix, arguments)
        sys.stdout.flush()  # a reader that has gone away (`| head`) shows here, not while Python shuts down
        return code
    except KeyboardInterrupt:
        return _end("stopped; the same command resumes from here", 130, debug)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except InputError as error:
        return _end(str(error), error.exit_code, debug)
    except OSError as error:
        if error.errno in _LACK_OF_ROOM:
            where = f" while writing {error.filename}" if error.filename else ""
            remedy = "make room and give the same command again: what was written before is kept"
            return _end(f"{_LACK_OF_ROOM[error.errno]}{where}; {remedy}", 1, debug)
        return _end(_told(error), 1, debug)
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        return _end(f"failed: {type(error).__name__}: {first} (--debug shows where)", 1, debug)


def _told(error: OSError) -> str:
    """Returns what the system refused, without its number."""
    if error.strerror is None:
        return " ".join(str(error).split())
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Ends a job at SIGTERM as at Ctrl-C: what it holds is closed, its workers end, and it says so.

    Training takes both signals itself while it makes steps, and saves first.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # forked, and told to end as any process
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def notes_as_lines() -> Iterator[None]:
    """Prints an `InputNote` as one line on stderr, and other warnings as Python does."""
    with warnings.catch_warnings():
        others, shown = warnings.showwarning, set[str]()

        def show(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
            if issubclass(category, InputNote):
                if str(message) not in shown:
                    print(f"note: {message}", file=sys.stderr)
                shown.add(str(message))
            else:
                others(message, category, *place, **options)

        warnings.showwarning = show
        warnings.simplefilter("default", InputNote)
        yield


def _end(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"error: {message}" if code != 130 else message, file=sys.stderr)
    return code


def _dispatch(program: str, prefix: str, arguments: list[str]) -> int:
    jobs = {
        name.removeprefix(prefix): point
        for name, point in plugins.found(plugins.JOBS).items()
        if name.startswith(prefix)
    }
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview(program, jobs))
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"{program} {installed_version()}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name == CONFIGS:
        print(_configs(program, prefix, jobs, rest))
        return 0
    if name == completions.COMMAND:
        print(completions.completion(program, jobs, rest))
        return 0
    if name not in jobs:
        raise InputError(f"there is no job {name!r}; {plugins.did_you_mean(name, list(jobs))}")
    if set(rest) & {"-h", "--help", HELP_ALL}:
        text = helps.job_help_all if HELP_ALL in rest else helps.job_help
        print(text(f"{program} {name}", schemas.describe(jobs[name]), _named_parts(rest)))
        return 0
    with announced(f"starting {program} {name}"):
        job: Callable[[Any], None] = jobs[name].load()
    schema = plugins.schema_of(job)
    file, overrides = parse(schema, rest)
    config: Any = configs.resolve(schema, file, overrides)
    with remote_out.working_copy(config) as config:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            job(config)
            return 0
        from clip_base.runtime import distributed  # noqa: PLC0415 (torchrun; torch is imported only for it)

        distributed.start()
        with distributed.naming_lost_processes():
            job(config)
    return 0


def _named_parts(arguments: Sequence[str]) -> dict[str, str]:
    """Returns the options on a command line that asks for help, and the parts that its config file names."""
    given = completions.given(arguments)
    file = given.pop("", "")
    return {**(configs.names_in(file) if file else {}), **given}


def _configs(program: str, prefix: str, jobs: Collection[str], arguments: Sequence[str]) -> str:
    """Returns the list of the configs that come with the project, of all jobs or of those that are named."""
    if set(arguments) & {"-h", "--help"}:
        return f"usage: {program} {CONFIGS} [JOB …]\n\nLists the config files that come with the project."
    unknown = next((job for job in arguments if job not in jobs), None)
    if unknown is not None:
        raise InputError(f"there is no job {unknown!r}; {plugins.did_you_mean(unknown, list(jobs))}")
    found = list(shipped.listed(prefix, arguments or jobs))
    if not found:
        return f"no config file comes with {' and '.join(arguments)}: its defaults are its options'"
    lines = [line for name, meaning in found for line in helps.named(name, meaning)]
    return "\n".join([*lines, "", f"{program} JOB NAME [key=value …] takes one, from wherever you are."])


def parse(schema: type, arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Splits a job's arguments into its config file and its `key=value` overrides."""
    fields = {key: (field, hint) for key, field, hint in configs.fields_of(schema)}
    positional = [key for key, (field, _) in fields.items() if field.metadata.get("positional")]
    file, overrides, plain = None, [], []
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        if argument.startswith("--"):
            key, equals, value = argument[2:].partition("=")
            key = key.replace("-", "_")
            if not equals:
                is_flag = key in fields and fields[key][1] is bool
                if is_flag and not (queue and queue[0].lower() in ("true", "false")):
                    value = "true"
                elif queue:
                    value = queue.pop(0)
                elif key in HERE and key not in fields:
                    value = "true"  # another program's flag: the error says what it is called here
                else:
                    raise InputError(f"--{key} needs a value")
            overrides.append(f"{key}={_quoted(value, fields.get(key))}")
        elif "=" in argument and not Path(argument).exists():
            key, _, value = argument.partition("=")
            overrides.append(f"{key}={_quoted(value, fields.get(key))}")
        elif argument.endswith((".yaml", ".yml")) and file is None:
            file = argument
        else:
            plain.append(argument)
    if plain and not positional:
        raise InputError(f"{plain[0]!r} is not key=value (see --help)")
    given = ", ".join(plain)
    for key in positional if plain else ():
        is_list = str(fields[key][1]).startswith("list")
        taken, plain = (plain, []) if is_list else (plain[:1], plain[1:])
        values = ",".join(_quote(item) for item in taken)
        if taken:
            overrides.append(f"{key}=[{values}]" if is_list else f"{key}={values}")
    if plain:
        raise InputError(f"only one {' and one '.join(positional)} can be given, found {given}")
    return file, overrides


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # what JSON quotes, YAML reads


def _quoted(value: str, known: tuple[dataclasses.Field[Any], Any] | None) -> str:
    """Quotes a text option's value, so that commas, colons and braces in it stay what they are.

    The type of a part's option is not known here; quoted numbers and flags are converted where it is checked.
    """
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" and value[0] not in value[1:-1]:
        return value
    if known is None:
        return value if value[:1] in ("[", "{") else _quote(value)
    if known[1] is str and "${" not in value:
        return _quote(value)
    if known[1] == list[str] and not value.startswith("["):
        return "[" + ",".join(_quote(item.strip()) for item in value.split(",") if item.strip()) + "]"
    if known[1] in (list[int], list[float]) and value and not value.startswith(("[", "$")):
        return f"[{value}]"
    return value


def _overview(program: str, jobs: dict[str, Any]) -> str:
    lines = [f"usage: {program} JOB [FILE.yaml] [key=value …]", "", "jobs:"]
    lines += helps.listed([(name, plugins.summary(point)) for name, point in sorted(jobs.items())])
    shell = Path(os.environ.get("SHELL", "")).name
    shell = shell if shell in completions.SHELLS else completions.SHELLS[0]
    lines += [
        "",
        f"`{program} JOB --help` shows a job's everyday options, `--help-all` all of them;",
        "key=value and --key value are the same.",
        f"`{program} {CONFIGS}` lists the included config files;",
        f"`{program} --version` shows the version.",
        f"TAB completes words after `{completions.how(program, shell)}`",
        f"(or {', '.join(other for other in completions.SHELLS if other != shell)}).",
    ]
    return "\n".join(lines)
