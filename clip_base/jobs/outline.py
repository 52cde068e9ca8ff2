"""What a job or a part says of itself, read from its source: its docstring and the dataclass of its options.

Options stand beside the code they govern, which imports PyTorch, spaCy and the like; `--help` and the
shell's completion want them in a fraction of the time that those imports take. So only the dataclass is
made, and what its fields name: constants, other dataclasses, other modules' constants. All else is left
alone.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import sys
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint
from typing import Any

from clip_base.jobs import plugins


@dataclass(frozen=True)
class Description:
    """What a job or a part says of itself.

    Attributes:
        text: its docstring.
        schema: the dataclass of its options; read from the source, it has their fields and no methods.
    """

    text: str
    schema: type


@cache
def describe(point: EntryPoint) -> Description:
    """Describes what `point` names, without importing its module if its source is plain enough."""
    if point.module not in sys.modules:
        try:
            return _read(point)
        except Exception:  # whatever its source does that is not followed here, the module itself does
            pass
    target = point.load()
    return Description(inspect.getdoc(target) or "", plugins.schema_of(target))


def _read(point: EntryPoint) -> Description:
    outline, node = _outline(point.module).find(point.attr)
    text = ast.get_docstring(node) or ""
    if isinstance(node, ast.ClassDef):
        outline, node = outline.constructor(node)
    (annotation,) = [
        given.annotation for given in node.args.args if given.arg == "config" and given.annotation
    ]
    schema = outline.evaluate(annotation)
    if not (isinstance(schema, type) and dataclasses.is_dataclass(schema)):
        raise TypeError(f"{schema!r} is no dataclass")
    return Description(text, schema)


class Outline:
    """A module of which only what is asked for is made, with what that names.

    Args:
        module: its dotted name.
    """

    def __init__(self, module: str) -> None:
        self._module = module
        self._made: dict[str, Any] = {"__name__": module}
        self._begun: set[str] = set()
        self._statements: dict[str, ast.stmt | None] = {}  # None: bound more than once
        for statement in plugins.source(module).body:
            for name in _bound_by(statement):
                self._statements[name] = None if name in self._statements else statement

    def __getattr__(self, name: str) -> Any:
        if name not in self._statements:
            return _outline(f"{self._module}.{name}")
        if name not in self._made:
            self._make(name)
        return self._made[name]

    def find(self, name: str) -> tuple[Outline, ast.FunctionDef | ast.ClassDef]:
        """Returns the function or class of that name, and the outline of the module that defines it."""
        statement = self._statements[name]
        if isinstance(statement, ast.ImportFrom):
            module, original = self._origin(statement, name)
            return _outline(module).find(original)
        if not isinstance(statement, ast.FunctionDef | ast.ClassDef):
            raise TypeError(f"{name} is neither a function nor a class")
        return self, statement

    def constructor(self, node: ast.ClassDef) -> tuple[Outline, ast.FunctionDef]:
        """Returns a class's `__init__`, its own or its first base's, and the outline it lies in."""
        for member in node.body:
            if isinstance(member, ast.FunctionDef) and member.name == "__init__":
                return self, member
        (base, *_) = [base.id for base in node.bases if isinstance(base, ast.Name)]
        outline, parent = self.find(base)
        if not isinstance(parent, ast.ClassDef):
            raise TypeError(f"{base} is no class")
        return outline.constructor(parent)

    def evaluate(self, expression: ast.expr) -> Any:
        """Returns the value of an expression in this module."""
        self._require(expression)
        return eval(compile(ast.Expression(expression), self._module, "eval", dont_inherit=True), self._made)

    def _make(self, name: str) -> None:
        statement = self._statements[name]
        if statement is None or name in self._begun:
            raise NameError(f"{name} is bound more than once, or by what it is needed for")
        self._begun.add(name)
        if isinstance(statement, ast.ImportFrom):
            self._made[name] = self._imported(*self._origin(statement, name))
            return
        if isinstance(statement, ast.ClassDef) and statement.decorator_list:
            statement = _fields_alone(statement)
        self._require(statement)
        # Without the module's `from __future__ import annotations`: types are then types, not their names.
        code = compile(ast.Module([statement], []), self._module, "exec", dont_inherit=True)
        exec(code, self._made)

    def _require(self, node: ast.AST) -> None:
        read = (part.id for part in ast.walk(node) if isinstance(part, ast.Name) and _is_read(part))
        for name in read:
            if name in self._statements and name not in self._made:
                self._make(name)

    def _origin(self, statement: ast.ImportFrom, name: str) -> tuple[str, str]:
        (original,) = [alias.name for alias in statement.names if (alias.asname or alias.name) == name]
        module = "." * statement.level + (statement.module or "")
        spec = importlib.util.find_spec(self._module)
        return importlib.util.resolve_name(module, spec.parent if spec else None), original

    def _imported(self, module: str, name: str) -> Any:
        loaded = sys.modules.get(module)
        if loaded is not None and hasattr(loaded, name):
            return getattr(loaded, name)
        own = {point.module.partition(".")[0] for point in plugins.found(plugins.JOBS).values()}
        if module.partition(".")[0] in own | {self._module.partition(".")[0]}:
            return getattr(_outline(module), name)
        return getattr(importlib.import_module(module), name)


@cache
def _outline(module: str) -> Outline:
    return Outline(module)


def _bound_by(statement: ast.stmt) -> list[str]:
    """Returns the names that a statement of a module binds, those of compound statements left out."""
    match statement:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Import(names=names) | ast.ImportFrom(names=names):
            return [alias.asname or alias.name.partition(".")[0] for alias in names]
        case ast.Assign(targets=targets):
            parts = (part for target in targets for part in ast.walk(target))
            return [part.id for part in parts if isinstance(part, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name)) | ast.AugAssign(target=ast.Name(id=name)):
            return [name]
    return []


def _is_read(name: ast.Name) -> bool:
    return isinstance(name.ctx, ast.Load)


def _fields_alone(node: ast.ClassDef) -> ast.ClassDef:
    """Returns a dataclass's definition without its methods."""
    fields: list[ast.stmt] = [member for member in node.body if isinstance(member, ast.AnnAssign)]
    bare = ast.ClassDef(node.name, node.bases, node.keywords, fields or [ast.Pass()], node.decorator_list)
    return ast.fix_missing_locations(ast.copy_location(bare, node))
