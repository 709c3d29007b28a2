# SPDX-License-Identifier: Apache-2.0
"""Catch code of this package that would run what a checkpoint brings, or open a door."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import vllm_layerskip
from vllm_layerskip.config.draft_vocab import read_draft_vocab
from vllm_layerskip.config.options import resolve_options

PACKAGE = Path(vllm_layerskip.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
FOR_COMMANDS = {PACKAGE / "measuring/cluster.py"}
"""It asks a Ray cluster that a user names whether it answers; no engine imports it."""
SERVING = [path for path in SOURCES if "training" not in path.parts and path not in FOR_COMMANDS]
"""Modules that an engine may import."""

UNPICKLERS = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
LISTENERS = {"socket", "socketserver", "http", "asyncio", "zmq", "uvicorn", "fastapi", "xmlrpc"}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_unpickled_or_evaluated(path):
    assert not UNPICKLERS & set(imports(path))
    for name, call in calls(path):
        assert name not in ("eval", "exec", "compile", "__import__"), ast.unparse(call)
        assert name not in ("yaml.load", "yaml.unsafe_load"), ast.unparse(call)
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        if name == "torch.load":
            assert ast.unparse(keywords.get("weights_only", call)) == "True", ast.unparse(call)
        if "trust_remote_code" in keywords:
            trust = keywords["trust_remote_code"]
            # A user's own setting may be handed on; we never choose it.
            assert not (isinstance(trust, ast.Constant) and trust.value), ast.unparse(call)


@pytest.mark.parametrize("path", SERVING, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_in_an_engine_listens(path):
    assert not LISTENERS & set(imports(path))


def test_the_scan_sees_what_it_looks_for(tmp_path):
    module = tmp_path / "module.py"
    module.write_text("import os\nfrom pickle import loads\nimport zmq.asyncio\neval('1')\n")
    assert set(imports(module)) == {"os", "pickle", "zmq"}
    assert [name for name, _ in calls(module)] == ["eval"]


@pytest.mark.parametrize("path", ["/etc/passwd", "../ids.json", "a/../../ids.json", "", 7])
def test_a_checkpoint_names_files_of_its_own_folder_only(path):
    block = {"exit_layer": 2, "num_speculative_tokens": 3, "draft_vocab": path}
    with pytest.raises(ValueError, match="inside the checkpoint's folder"):
        resolve_options({"method": "layerskip"}, num_layers=4, config_block=block)


def test_a_pipe_or_a_device_is_not_read(tmp_path):
    """One would block the start for ever, the other fill the memory."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(ValueError, match="no regular file"):
            read_draft_vocab(tmp_path / name, f"draft_vocab={name!r}", vocab_size=128)
