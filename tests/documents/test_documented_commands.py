# SPDX-License-Identifier: Apache-2.0
"""Run every command of the documents, as it is written, except those that need GPUs or hours.

The blocks that are quick run by default, the rest with ``-m slow``. A new block is slow until it is
listed here.
"""

from __future__ import annotations

import pytest
import sandbox
from markdown import all_blocks

QUICK = ("benchmarks.decode.limits", "benchmarks.pages.report", "vllm-layerskip draft-vocab")
"""A block is quick if each of its commands is one of these."""
ELSEWHERE = {
    "docs/adding-an-architecture.md": "engine/exactness/test_third_party_model.py",
}
"""Documents whose code another test takes from them."""


def _commands(text):
    joined = text.replace("\\\n", " ")
    return [line for line in joined.split("\n") if line.strip() and not line.startswith("#")]


def _marks(block):
    is_quick = block.language == "bash" and all(
        any(quick in command for quick in QUICK) for command in _commands(block.text)
    )
    return () if is_quick else (pytest.mark.slow,)


BLOCKS = [
    pytest.param(block, marks=_marks(block), id=str(block))
    for block in all_blocks()
    if block.language in ("bash", "python")
    and not block.is_left_out
    and not block.is_file
    and block.document not in ELSEWHERE
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sandbox.make(tmp_path_factory.mktemp("documents"))


@pytest.mark.parametrize("block", BLOCKS)
def test_commands_of_the_documents(block, folder):
    print(sandbox.run(block, folder))
