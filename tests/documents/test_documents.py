# SPDX-License-Identifier: Apache-2.0
"""Catch a document that points nowhere, and a command in one that nobody runs."""

from __future__ import annotations

import ast
import json

import pytest
import yaml
from markdown import ROOT, all_blocks, anchors, documents, links
from sandbox import SHORTER

DOCUMENTS = documents()


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


def test_what_is_shortened_stands_in_a_document():
    text = "".join(block.text for block in all_blocks())
    assert not [long for long in SHORTER if long not in text]
