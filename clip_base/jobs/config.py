"""One dataclass is a job's schema: YAML and `key=value` overrides are merged into it and checked.

A field is declared with `option(default, meaning)`; a field that names a plugin with
`plugin(group, name, meaning)`. The same declarations make `--help`. Options that several jobs share are a
dataclass of their own (`kw_only=True`) that the jobs' inherit from; see `ordered_fields`.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from clip_base.jobs import familiar, plugins
from clip_base.jobs.everyday import everyday_of
from clip_base.jobs.shipped import find_config
from clip_base.runtime.errors import InputError, quote, shortened
from clip_base.storage.tables import read_yaml

T = TypeVar("T")
REQUIRED: Any = MISSING
Plugin = dict[str, Any]


def option(
    default: T,
    meaning: str,
    *,
    positional: bool = False,
    runtime_only: bool = False,
    choices: Sequence[str] = (),
    renamed_from: str = "",
) -> T:
    """Declares a field of a config dataclass.

    Args:
        default: the value without one given; `REQUIRED` makes the user give it.
        meaning: one line for `--help`, with the unit.
        positional: the command line's plain arguments go to this field.
        runtime_only: a run may resume with another value, since its result does not depend on it.
        choices: the values it may take.
        renamed_from: the option's former name, which is an error that names this one.
    """
    metadata = {
        "meaning": meaning,
        "positional": positional,
        "runtime_only": runtime_only,
        "choices": tuple(choices),
        "renamed_from": renamed_from,
    }
    if isinstance(default, list | dict) or dataclasses.is_dataclass(default):
        return cast(T, dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata))
    return dataclasses.field(default=default, metadata=metadata)


def plugin(group: str, name: str, meaning: str) -> Plugin:
    """Declares a field that holds a plugin: `{name: …, its own options}`, by default the one called `name`.

    Args:
        group: of entry points, see `clip_base.jobs.plugins`.
        name: of the default; "none" makes the plugin optional.
        meaning: one line for `--help`.
    """
    metadata = {"meaning": meaning, "group": group}
    return cast(Plugin, dataclasses.field(default_factory=lambda: {"name": name}, metadata=metadata))


def resolve(schema: type[T], file: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Merges the dataclass's defaults, a YAML file and `key=value` overrides, in that order.

    Raises:
        InputError: an unknown key (the nearest right one is named), a value of the wrong type, a missing one.
    """
    config = OmegaConf.structured(schema)
    if file is not None:
        config = _merge(config, _read_yaml(find_config(file)), f"{file}: ")
    changes = []
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise InputError(f"{override!r} is not key=value")
        try:
            changes.append(OmegaConf.from_dotlist([override]))
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{override!r} cannot be read: {reason}; quote special characters") from None
    if changes:
        # All at once: a part's name and its options may then come in any order.
        config = _merge(config, OmegaConf.merge(*changes), "")
    return _finish(schema, config, "")


def names_in(file: str | Path) -> dict[str, str]:
    """Returns the parts that a config file names, as {"proposer.name": "grid"}.

    Raises:
        InputError: the file is missing or not YAML.
    """
    held = _read_yaml(find_config(file))
    parts = {str(key): value for key, value in held.items() if isinstance(value, DictConfig)}
    return {f"{key}.name": str(value.name) for key, value in parts.items() if "name" in value}


def check(schema: type[T], values: dict[str, Any], where: str) -> T:
    """Returns a `schema` made from plain values, with the same checks as `resolve`."""
    if not isinstance(values, dict):  # they may come from a file
        raise InputError(f"{where} must be keys and values, found {quote(values)}")
    where = f"{where}: "
    return _finish(schema, _merge(OmegaConf.structured(schema), OmegaConf.create(values), where), where)


def to_yaml(config: Any) -> str:
    """Returns a resolved config as YAML, a job's own options first."""
    plain = dataclasses.asdict(config)
    ordered = {field.name: plain[field.name] for field in ordered_fields(type(config))}
    return OmegaConf.to_yaml(OmegaConf.create(ordered))


def _read_yaml(path: Path) -> DictConfig:
    loaded = read_yaml(path, "config file")
    if not isinstance(loaded, DictConfig):
        raise InputError(f"config file {path} must hold keys and values, not a list")
    return loaded


def _merge(config: Any, change: Any, where: str) -> Any:
    schema = cast(type, OmegaConf.get_type(config))
    for key in everyday_of(schema).unused:
        if OmegaConf.select(change, key) is not None:
            raise InputError(f"{where}option {key!r} does nothing in this job; omit it")
    try:
        for key, value in change.items():
            node = config.get(key, None) if key in config else None
            if not isinstance(node, DictConfig):
                continue
            if not isinstance(value, DictConfig):
                inner = f"{key}.name" if "name" in node else f"{key}.{next(map(str, node), 'NAME')}"
                raise InputError(f"{where}option {key!r} is a group of options; give {inner}=…")
            # A part that is named again starts from that part's defaults, not from another part's options.
            if "name" in value and node.get("name") not in (None, value.name):
                config[key] = {"name": value.name}
        return OmegaConf.merge(config, change)
    except ConfigKeyError as error:
        key = str(error.full_key or error.key)
        known = [name for name, _, _ in fields_of(schema)]
        value = OmegaConf.select(change, key)
        hint = _new_name(schema, key) or familiar.hint(key, value, known) or plugins.did_you_mean(key, known)
        raise InputError(f"{where}there is no option {quote(key)}; {hint}") from None
    except (ValidationError, OmegaConfBaseException, AssertionError, TypeError) as error:
        key, reason = getattr(error, "full_key", ""), str(error).splitlines()[0]
        raise InputError(f"{where}option {quote(key)}: {shortened(reason, 200)}") from None


def _new_name(schema: type, key: str) -> str:
    """Says what a renamed option is called now; "" for a key that was never an option."""
    for name, field, _ in fields_of(schema):
        former = field.metadata.get("renamed_from")
        if former and key == name.removesuffix(field.name) + former:
            return f"it is called {name} now"
    return ""


def _finish(schema: type[T], config: Any, where: str) -> T:
    try:
        missing = sorted(str(key) for key in OmegaConf.missing_keys(config))
        if missing:
            raise InputError(f"{where}missing: {', '.join(f'{key}=…' for key in missing)}; see --help")
        made = cast(T, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        cause = error.__cause__
        if isinstance(cause, InputError):
            raise cause from None
        raise InputError(f"{where}{shortened(str(error).partition(chr(10))[0], 200)}") from None
    _check_fields(made, where)
    return made


def _check_fields(config: Any, where: str, prefix: str = "") -> None:
    """Checks choices and fills in the options of parts, so that the resolved config is complete."""
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            _check_fields(value, where, f"{key}.")
        choices = field.metadata.get("choices") or ()
        if choices and value not in choices:
            hint = plugins.did_you_mean(str(value), list(choices))
            raise InputError(
                f"{where}option {key!r}: {quote(value)} is not one of {', '.join(choices)}; {hint}"
            )
        group = field.metadata.get("group")
        if group:
            name = str(value.get("name", ""))
            if name == default_of(field)["name"] == "none":
                object.__setattr__(config, field.name, {"name": name})
                continue
            target = plugins.load(group, name)
            options = {k: v for k, v in value.items() if k != "name"}
            checked: Any = check(plugins.schema_of(target), options, f"{where}{key} ({name})")
            object.__setattr__(config, field.name, {"name": name, **dataclasses.asdict(checked)})


def ordered_fields(schema: type) -> list[dataclasses.Field[Any]]:
    """Returns a config's fields: its own first, then those of the groups that it inherits from, as listed.

    `dataclasses.fields` puts inherited ones first, which would open every help with how a job computes. A
    field that a class declares again, with a default of its own, stands where that class has it (as an
    argument of `__init__` it does not: such a class has `kw_only=True`).
    """
    declared = [name for base in schema.__mro__ for name in inspect.get_annotations(base)]
    return sorted(dataclasses.fields(schema), key=lambda field: declared.index(field.name))


def fields_of(schema: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Yields (dotted key, field, type) for every option of a schema, nested ones included."""
    hints, unused = typing.get_type_hints(schema), everyday_of(schema).unused
    for field in ordered_fields(schema):
        hint = hints[field.name]
        yield f"{prefix}{field.name}", field, hint
        if dataclasses.is_dataclass(hint):
            inner = fields_of(cast(type, hint), f"{prefix}{field.name}.")
            yield from (one for one in inner if one[0].removeprefix(prefix) not in unused)


def runtime_only(schema: type) -> set[str]:
    """Returns the dotted keys of the options that do not decide a run's result."""
    return {key for key, field, _ in fields_of(schema) if field.metadata.get("runtime_only")}


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Returns a field's default, made when it has a factory."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def build_plugin(group: str, spec: dict[str, Any], **context: Any) -> Any:
    """Builds the plugin that `spec` names: {"name": …, and the plugin's own options}.

    Args:
        group: entry-point group.
        spec: the plugin's name and options; unknown options and wrong types are InputErrors.
        context: further constructor arguments that the job supplies.
    """
    target = plugins.load(group, str(spec.get("name", "")))
    options = {key: value for key, value in spec.items() if key != "name"}
    return target(check(plugins.schema_of(target), options, f"{group} {spec['name']}"), **context)
