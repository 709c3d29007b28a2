# SPDX-License-Identifier: Apache-2.0
"""Compare what the plugin touches in vLLM with a vLLM that is not installed.

  python tools/check_vllm.py 0.33.0               download the wheel, without dependencies
  python tools/check_vllm.py --wheel FILE         a wheel that is at hand
  python tools/check_vllm.py --installed          the installed vLLM, likewise from its files
      [--record FILE]   write the signatures that were found (tests/unit/tools/data)
      [--compare FILE]  say what changed since a recorded version

Nothing of that vLLM is imported or run: its Python files are parsed, and every contact of
``host.contacts.all_contacts()`` is looked up as Python would bind it (imports, re-exports,
star imports, base classes, generated constructors). The exit status is 1 if one is missing
or takes other parameters.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import importlib.util
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vllm_layerskip.host.check import parameters_problem
from vllm_layerskip.host.contacts import HostContact, all_contacts
from vllm_layerskip.host.version import vllm_version

CACHE = Path("~/.cache/vllm-layerskip/wheels").expanduser()
# Any platform's wheel will do: its Python files are the same.
WHEEL_TAGS = ("--platform", "manylinux_2_28_x86_64", "--python-version", "3.12")

_DATACLASS_DECORATORS = {"dataclass", "config", "pydantic_dataclass"}
_FIELD_BASES = {"NamedTuple", "Struct"}


class NotFound(LookupError):
    """A name that the parsed files do not bind."""


class Sources:
    """Python files of one package, by module name; other packages are not read."""

    def __init__(self, root: Path | zipfile.Path, package: str = "vllm") -> None:
        self.root, self.package = root, package
        self.module = functools.cache(self._parse)

    def is_package(self, name: str) -> bool:
        return self._file(name, "__init__.py").is_file()

    def _file(self, name: str, suffix: str) -> Any:
        *folders, last = name.split(".")
        path: Any = self.root
        for folder in folders:
            path = path / folder
        return path / last / suffix if suffix == "__init__.py" else path / f"{last}{suffix}"

    def _parse(self, name: str) -> ast.Module | None:
        if name.partition(".")[0] != self.package:
            return None
        for suffix in ("__init__.py", ".py"):
            file = self._file(name, suffix)
            if file.is_file():
                return ast.parse(file.read_text(encoding="utf-8"))
        return None


class Found(NamedTuple):
    """What a name is bound to, and the module whose names it may use."""

    module: str
    node: ast.AST


class Signature(NamedTuple):
    """``parameters`` in order: ``name``, ``name=`` (has a default), ``*name``, ``**name``,
    and ``*`` in front of those that must be named. None: it is not called."""

    kind: str
    parameters: tuple[str, ...] | None

    @property
    def names(self) -> list[str]:
        return [p.strip("*=") for p in self.parameters or () if p != "*"]


class Resolver:
    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        self._looking_for: set[tuple[str, str]] = set()

    def signature(self, path: str) -> Signature:
        """The signature of what ``module:attribute.attribute`` names.

        Raises:
            NotFound: some part of it does not exist.
        """
        module, _, attributes = path.partition(":")
        name, *rest = attributes.split(".")
        found = self._in_module(module, name)
        for attribute in rest:
            owner = self._class_of(found)
            if owner is None:
                raise NotFound(f"{attribute} of {ast.unparse(found.node)[:60]!r}")
            if attribute == "__init__" and (fields := self._fields(owner)) is not None:
                return Signature("function", ("self", *fields))
            found = self._in_class(owner, attribute)
        return self._signature_of(found, is_attribute=bool(rest))

    def _class_of(self, found: Found) -> Found | None:
        """``found`` if it is a class; its class if it is an instance."""
        value = getattr(found.node, "value", None)
        if isinstance(value, ast.Call):
            found = self._expression(found.module, value.func) or found
        return found if isinstance(found.node, ast.ClassDef) else None

    def _signature_of(self, found: Found, is_attribute: bool) -> Signature:
        node = found.node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            decorators = {_last_name(decorator) for decorator in node.decorator_list}
            if decorators & {"property", "cached_property"}:
                return Signature("property", None)
            parameters = _parameters(node.args)
            if "classmethod" in decorators:
                parameters = parameters[1:]
            return Signature("kernel" if "jit" in decorators else "function", parameters)
        if isinstance(node, ast.ClassDef):
            fields = self._fields(found)
            if fields is None:
                try:
                    init = self._in_class(found, "__init__")
                except NotFound:
                    return Signature("class", None)
                assert isinstance(init.node, ast.FunctionDef)
                fields = _parameters(init.node.args)[1:]
            return Signature("class", fields)
        return Signature("attribute" if is_attribute else "value", None)

    def _in_module(self, module: str, name: str) -> Found:
        if (module, name) in self._looking_for:
            raise NotFound(f"{name} in {module}")  # Two modules import it from one another.
        self._looking_for.add((module, name))
        try:
            return self._bound_in_module(module, name)
        finally:
            self._looking_for.remove((module, name))

    def _bound_in_module(self, module: str, name: str) -> Found:
        tree = self.sources.module(module)
        if tree is None:
            raise NotFound(f"module {module}")
        for binding in _bindings(tree.body, name):
            try:
                return self._follow(module, binding, name)
            except NotFound:
                continue
        if self.sources.module(f"{module}.{name}") is not None:
            return Found(f"{module}.{name}", ast.Module([], []))
        raise NotFound(f"{name} in {module}")

    def _follow(self, module: str, binding: ast.stmt, name: str) -> Found:
        if isinstance(binding, ast.ImportFrom):
            source = self._imported_module(module, binding)
            for alias in binding.names:
                if alias.name == "*":
                    self._check_exported(source, name)
                    return self._in_module(source, name)
                if (alias.asname or alias.name) == name:
                    return self._in_module(source, alias.name)
        if isinstance(binding, ast.Assign | ast.AnnAssign) and isinstance(binding.value, ast.Name):
            try:  # Another name of something of this module.
                return self._in_module(module, binding.value.id)
            except NotFound:
                pass
        return Found(module, binding)

    def _imported_module(self, module: str, statement: ast.ImportFrom) -> str:
        if not statement.level:
            return statement.module or ""
        parts = module.split(".")
        keep = len(parts) - statement.level + self.sources.is_package(module)
        return ".".join([*parts[:keep], *([statement.module] if statement.module else [])])

    def _check_exported(self, module: str, name: str) -> None:
        tree = self.sources.module(module)
        if tree is None:
            raise NotFound(f"module {module}")
        exported = None
        for statement in tree.body:
            if isinstance(statement, ast.Assign) and _binds(statement, "__all__"):
                exported = {getattr(item, "value", None) for item in statement.value.elts}  # type: ignore[attr-defined]
        if name not in exported if exported is not None else name.startswith("_"):
            raise NotFound(f"{name} is not exported by {module}")

    def _in_class(self, owner: Found, name: str) -> Found:
        for cls in self._mro(owner):
            assert isinstance(cls.node, ast.ClassDef)
            for binding in _bindings(cls.node.body, name):
                return Found(cls.module, binding)
        raise NotFound(f"{name} in class {getattr(owner.node, 'name', '?')}")

    def _mro(self, cls: Found) -> Iterator[Found]:
        """The class and those of its bases that the files hold, nearest first."""
        yield cls
        assert isinstance(cls.node, ast.ClassDef)
        for base in cls.node.bases:
            found = self._expression(cls.module, base)
            if found is not None and isinstance(found.node, ast.ClassDef):
                yield from self._mro(found)

    def _expression(self, module: str, node: ast.expr) -> Found | None:
        if isinstance(node, ast.Subscript):  # Generic[T]
            return self._expression(module, node.value)
        try:
            if isinstance(node, ast.Name):
                return self._in_module(module, node.id)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                return self._of_imported_module(module, node.value.id, node.attr)
        except NotFound:
            pass
        return None  # It belongs to another package.

    def _of_imported_module(self, module: str, alias: str, name: str) -> Found:
        tree = self.sources.module(module)
        for binding in _bindings(tree.body if tree else [], alias):
            if isinstance(binding, ast.Import):
                for imported in binding.names:
                    if imported.asname == alias:
                        return self._in_module(imported.name, name)
        found = self._in_module(module, alias)
        return self._in_module(found.module, name)

    def _fields(self, cls: Found) -> tuple[str, ...] | None:
        """Parameters of a generated ``__init__``; None if the class writes its own."""
        fields: dict[str, str] = {}
        generated = False
        for part in reversed(list(self._mro(cls))):
            assert isinstance(part.node, ast.ClassDef)
            if any(_binds(statement, "__init__") for statement in part.node.body):
                generated, fields = False, {}
                continue
            if not _generates_init(part.node) and part.node is not cls.node:
                continue
            if not _generates_init(part.node) and not generated:
                return None
            generated = True
            for statement in part.node.body:
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                    field = _field(statement)
                    if field is not None:
                        fields[statement.target.id] = field
        return tuple(fields.values()) if generated else None


def _generates_init(node: ast.ClassDef) -> bool:
    return bool(
        {_last_name(decorator) for decorator in node.decorator_list} & _DATACLASS_DECORATORS
        or {_last_name(base) for base in node.bases} & _FIELD_BASES
    )


def _field(statement: ast.AnnAssign) -> str | None:
    name = ast.unparse(statement.target)
    if _last_name(statement.annotation) == "ClassVar":
        return None
    value = statement.value
    if value is None:
        return name
    if isinstance(value, ast.Call) and _last_name(value) in ("field", "Field"):
        options = {keyword.arg: keyword.value for keyword in value.keywords}
        init = options.get("init")
        if isinstance(init, ast.Constant) and init.value is False:
            return None
        if not (value.args or options.keys() & {"default", "default_factory"}):
            return name
    return f"{name}="


def _last_name(node: ast.expr) -> str:
    """``c`` of ``a.b.c``, ``a.b.c(...)`` and ``a.b.c[...]``."""
    while isinstance(node, ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _parameters(arguments: ast.arguments) -> tuple[str, ...]:
    positional = [*arguments.posonlyargs, *arguments.args]
    required = len(positional) - len(arguments.defaults)
    names = [a.arg + "=" * (index >= required) for index, a in enumerate(positional)]
    if arguments.vararg:
        names.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        names.append("*")
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        names.append(argument.arg + "=" * (default is not None))
    if arguments.kwarg:
        names.append(f"**{arguments.kwarg.arg}")
    return tuple(names)


def _bindings(body: Iterable[ast.stmt], name: str) -> list[ast.stmt]:
    """Statements that may bind ``name`` at run time, the likeliest first."""
    found: list[ast.stmt] = []
    for statement in body:
        if isinstance(statement, ast.If):
            if _last_name(statement.test) == "TYPE_CHECKING":
                nested = _bindings(statement.orelse, name)
            else:
                nested = _bindings(statement.body, name) + _bindings(statement.orelse, name)
        elif isinstance(statement, ast.Try):
            handlers = [line for handler in statement.handlers for line in handler.body]
            nested = _bindings([*statement.body, *statement.orelse], name)
            nested += _bindings(handlers, name)
        elif isinstance(statement, ast.With):
            nested = _bindings(statement.body, name)
        else:
            nested = [statement] if _binds(statement, name) else []
        found = nested + found
    # An explicit binding outranks a star import.
    return sorted(found, key=_is_star)


def _is_star(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.ImportFrom) and statement.names[0].name == "*"


def _binds(statement: ast.stmt, name: str) -> bool:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        overload = "overload" in {_last_name(d) for d in statement.decorator_list}
        return statement.name == name and not overload
    if isinstance(statement, ast.ImportFrom):
        return any((a.asname or a.name) == name or a.name == "*" for a in statement.names)
    if isinstance(statement, ast.Import):
        return any((a.asname or a.name.partition(".")[0]) == name for a in statement.names)
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    if isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)


@dataclasses.dataclass(frozen=True)
class Report:
    version: str
    signatures: dict[str, Signature | None]
    """By contact path; None: missing."""
    problems: list[str]

    def to_json(self) -> str:
        """One line per contact: its kind and, if it is called, its parameters."""
        lines = [
            f"  {json.dumps(path)}: {json.dumps(found and [found.kind, found.parameters])}"
            for path, found in sorted(self.signatures.items())
        ]
        contacts = ",\n".join(lines)
        return f'{{\n "vllm": {json.dumps(self.version)},\n "contacts": {{\n{contacts}\n }}\n}}\n'


def inspect_sources(
    sources: Sources, version: str, contacts: Sequence[HostContact] = all_contacts()
) -> Report:
    resolver = Resolver(sources)
    signatures: dict[str, Signature | None] = {}
    problems = []
    for contact in contacts:
        try:
            found = resolver.signature(contact.path)
        except NotFound as error:
            signatures[contact.path] = None
            problems.append(f"{contact.path} is missing ({error})")
            continue
        signatures[contact.path] = found
        if contact.parameters:
            problem = parameters_problem(contact, found.names)
            if problem is not None:
                problems.append(problem)
    return Report(version, signatures, problems)


def changes(old: dict[str, Any], report: Report) -> Iterator[str]:
    """Contacts whose signature differs from a recorded one's, one line each."""
    new = json.loads(report.to_json())["contacts"]
    for path in sorted(old["contacts"].keys() & new.keys()):
        if old["contacts"][path] != new[path]:
            yield f"{path}\n  {old['vllm']}: {old['contacts'][path]}\n  now: {new[path]}"


def download(version: str) -> Path:
    CACHE.mkdir(parents=True, exist_ok=True)
    if not (cached := sorted(CACHE.glob(f"vllm-{version}-*.whl"))):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", *WHEEL_TAGS, "--dest", str(CACHE), f"vllm=={version}"]
        subprocess.run(command, check=True)
        cached = sorted(CACHE.glob(f"vllm-{version}-*.whl"))
    return cached[0]


def installed_root() -> Path:
    """Folder that holds the installed vLLM's package, found without importing it."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise SystemExit("vLLM is not installed here.")
    return Path(spec.origin).parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("version", nargs="?", help="release to download, such as 0.33.0")
    what.add_argument("--wheel", type=Path)
    what.add_argument("--installed", action="store_true")
    parser.add_argument("--record", type=Path, metavar="FILE")
    parser.add_argument("--compare", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.installed:
        sources, version = Sources(installed_root()), vllm_version()
    else:
        wheel = args.wheel or download(args.version)
        sources, version = Sources(zipfile.Path(wheel)), wheel.name.split("-")[1]
    report = inspect_sources(sources, version)
    if args.compare:
        print(*changes(json.loads(args.compare.read_text()), report), sep="\n")
    if args.record:
        args.record.parent.mkdir(parents=True, exist_ok=True)
        args.record.write_text(report.to_json())
    print(
        f"vLLM {version}: {len(report.signatures) - len(report.problems)} of "
        f"{len(report.signatures)} contacts fit."
    )
    for problem in report.problems:
        print(f"  {problem}")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
