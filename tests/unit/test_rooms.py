# SPDX-License-Identifier: Apache-2.0
"""Which room of the house may import which, and that no two modules import each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

ROOMS = {
    # From the ground up: a room may import itself and those before it.
    "vllm_layerskip": (
        "errors", "architectures", "files", "chats", "twins", "example_model", "host", "cpu",
        "config", "metrics", "worker", "models", "plugin", "counters", "measuring", "evaluation",
        "training", "tuning", "batch", "commands",
    ),
    "benchmarks": ("engines", "decode", "serve", "prompts", "pages", "gpu"),
}  # fmt: skip


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path): path for package in ROOMS for path in sorted((ROOT / package).rglob("*.py"))
}


def imports(tree: ast.AST, everywhere: bool) -> Iterator[str]:
    """Modules of ours that a file imports, in functions too if ``everywhere``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        elif everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports(node, everywhere)


def imports_of(name: str, everywhere: bool = False) -> set[str]:
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    return {found for found in imports(tree, everywhere) if found in MODULES and found != name}


def room_of(name: str) -> tuple[str, str]:
    package, _, rest = name.partition(".")
    return package, rest.partition(".")[0]


def runs_upward(importer: str, imported: str) -> bool:
    (package, room), (other_package, other_room) = room_of(importer), room_of(imported)
    if not other_room:  # The package itself: its version.
        return False
    if package != other_package:
        return package == "vllm_layerskip"
    order = ROOMS[package]
    return bool(room) and order.index(other_room) > order.index(room)


@pytest.mark.parametrize("name", MODULES)
def test_no_import_runs_upward(name):
    """Not even one inside a function: a late import may save time, but not hide a circle."""
    upward = [found for found in imports_of(name, everywhere=True) if runs_upward(name, found)]
    assert upward == []


def test_no_circle_of_imports():
    graph = {name: imports_of(name, everywhere=True) for name in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_every_room_is_in_the_order():
    assert {room_of(name)[1] for name in MODULES if room_of(name)[1]} == {
        room for rooms in ROOMS.values() for room in rooms
    }


def test_the_root_has_few_files():
    assert len(list((ROOT / "vllm_layerskip").glob("*.py"))) <= 6


def test_a_wrong_import_would_be_seen():
    """The negative control."""
    assert runs_upward("vllm_layerskip.config.options", "vllm_layerskip.worker.speculator")
    assert runs_upward("vllm_layerskip.files.found", "benchmarks.engines.modes")
    assert not runs_upward("vllm_layerskip.worker.speculator", "vllm_layerskip.config.options")
    source = "def late():\n    from vllm_layerskip.worker import speculator"
    assert set(imports(ast.parse(source), everywhere=True)) == {"vllm_layerskip.worker.speculator"}
    assert set(imports(ast.parse(source), everywhere=False)) == set()
