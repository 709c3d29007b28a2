# SPDX-License-Identifier: Apache-2.0
"""Catch a document that points nowhere, a command in one that nobody runs, and a stale name."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from markdown import ROOT, all_blocks, anchors, blocks, documents, links
from sandbox import SHORTER

from vllm_layerskip.commands.main import build_parser

DOCUMENTS = documents()

FOLDERS = ("vllm_layerskip", "benchmarks", "tests", "tools", "examples")
OUR_FILES = {
    p.relative_to(ROOT) for f in FOLDERS for e in ("py", "sh") for p in (ROOT / f).rglob(f"*.{e}")
}
VLLM_FILES = "docs/gpu.md"
"""The page that also names files of vLLM."""


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    broken = []
    for link in links(path):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_every_page_can_be_found_from_the_readme():
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        path = waiting.pop()
        if path in reached:
            continue
        reached.add(path)
        targets = [(path.parent / link.partition("#")[0]).resolve() for link in links(path)]
        waiting += [target for target in targets if target.suffix == ".md" and target.exists()]
    pages = set((ROOT / "docs").glob("*.md")) | {ROOT / "CONTRIBUTING.md"}
    assert not pages - reached


@pytest.mark.parametrize("block", all_blocks(), ids=str)
def test_blocks_are_what_they_say(block):
    match block.language:
        case "python":
            ast.parse(block.text)
        case "json":
            json.loads(block.text)
        case "yaml":
            yaml.safe_load(block.text)
        case "bash" | "toml":
            pass
        case "":
            assert "$ " not in block.text, "a command: say bash"
        case _:
            pytest.fail(f"{block}: {block.language} is not checked by anything")


LEFT_OUT = [block for block in all_blocks() if block.is_left_out]


@pytest.mark.parametrize("block", LEFT_OUT, ids=str)
def test_options_of_commands_that_nobody_runs_exist(block):
    for line in block.text.replace("\\\n", " ").split("\n"):
        if line.startswith("vllm-layerskip "):
            words = shlex.split(line, comments=True)[1:]
            build_parser().parse_args([word for word in words if word != "..."])


def test_what_is_shortened_stands_in_a_document():
    text = "".join(block.text for block in all_blocks())
    assert not [long for long in SHORTER if long not in text]


def names_in(path: Path) -> set[str]:
    """Functions, classes and variables of a module, and what it imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                found.add(name)
            case ast.ClassDef(name=name) | ast.alias(name=name):
                found.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                found.add(name)
    return found


def has_file(name: str, files: set[Path]) -> bool:
    parts = Path(name).parts
    return any(file.parts[-len(parts) :] == parts for file in files)


def has_dotted_name(name: str) -> bool:
    """Whether it is a module, or a name in one."""
    folder, parts = ROOT, name.split(".")
    while parts and (folder / parts[0]).is_dir():
        folder /= parts.pop(0)
    if parts and (folder / f"{parts[0]}.py").is_file():
        module = folder / f"{parts.pop(0)}.py"
    else:
        module = folder / "__init__.py"
    return not parts or parts[0] in names_in(module)


def has_test(file: str, names: list[str]) -> bool:
    path = ROOT / "tests" / file
    if path.is_dir():
        return not names
    module = path.with_suffix(".py")
    return module.is_file() and set(names) <= names_in(module)


def stale_files(text: str, of_vllm: set[Path]) -> Iterator[str]:
    for name in re.findall(r"(?<![\w/.:-])(?:\.\./)*([\w./-]*\w\.(?:py|sh))\b", text):
        if not name.startswith("tests/v1/") and not has_file(name, OUR_FILES | of_vllm):
            yield name


def stale_modules(text: str) -> Iterator[str]:
    for name in re.findall(r"\b(?:vllm_layerskip|benchmarks)(?:\.\w+)+", text):
        is_other = name.endswith((".md", ".json")) or name.split(".")[1].isupper()
        if not is_other and not has_dotted_name(name):
            yield name
    for module, names in re.findall(r"^from (vllm_layerskip[\w.]*) import ([\w, ]+)$", text, re.M):
        yield from (name for name in names.split(", ") if not has_dotted_name(f"{module}.{name}"))


def stale_tests(text: str) -> Iterator[str]:
    pattern = r"`(?:tests/)?((?:engine|unit|documents)/[\w/]+)(?:\.py)?((?:::\w+)*)`"
    for file, names in re.findall(pattern, text):
        if not has_test(file, names.split("::")[1:]):
            yield file + names


def stale_names(text: str, of_vllm: set[Path] | None = None) -> list[str]:
    """Files, modules, their names and tests of ours that a text has and the checkout has not."""
    return [*stale_files(text, of_vllm or set()), *stale_modules(text), *stale_tests(text)]


def vllms_files() -> set[Path]:
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0])
    return {path.relative_to(root) for path in root.rglob("*.py")}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_page_names_exists(path):
    text = path.read_text(encoding="utf-8")
    of_vllm = vllms_files() if path == ROOT / VLLM_FILES else set()
    own = {block.text.split()[1] for block in blocks(path) if block.is_file}
    assert [name for name in stale_names(text, of_vllm) if name not in own] == []


STALE = (
    "`vllm_layerskip/host.py`",
    "(`no_such_module.py`)",
    "`bash benchmarks/no_such_session.sh first`",
    "`vllm_layerskip.training.train`",
    "`vllm_layerskip.counters.no_such_function(llm)`",
    "python -m benchmarks.compare --help",
    "from vllm_layerskip.counters import read_counters, no_such_function",
    "`engine/no_such_test`",
    "`unit/test_rooms::test_no_such_thing`",
)


@pytest.mark.parametrize("text", STALE)
def test_a_stale_name_is_seen(text):
    """The negative control."""
    assert stale_names(text)
    assert stale_names("`tests/unit/test_rooms.py::test_no_circle_of_imports`, plugin.py") == []
