# SPDX-License-Identifier: Apache-2.0
"""docs/tests.md names tests that exist, and every class of bug."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INDEX = (ROOT / "docs" / "tests.md").read_text()
NAMED_TESTS = sorted(set(re.findall(r"`((?:engine|unit)/(?:\w+/)*test_\w+\.py)::(\w+)`", INDEX)))
NAMED_FILES = sorted(set(re.findall(r"`((?:engine|unit)/(?:\w+/)*\w+\.py)(?:::\w+)?`", INDEX)))


def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("file", NAMED_FILES)
def test_named_files_exist(file):
    assert (ROOT / "tests" / file).is_file()


@pytest.mark.parametrize(("file", "test"), NAMED_TESTS)
def test_named_tests_exist(file, test):
    assert test.startswith("test_")
    assert test in functions(ROOT / "tests" / file)


def test_every_class_has_a_row():
    rows = re.findall(r"^\| (T\d+) \|(.*)$", INDEX, re.M)
    assert [number for number, _ in rows] == [f"T{number}" for number in range(1, 28)]
    # A row says what tests the class, or that it is refused.
    for number, row in rows:
        assert "::test_" in row or "refused" in row or "not tested" in row, number


def test_no_reference_escapes_the_check():
    """A name in another notation would be compared with nothing."""
    mentions = re.findall(r"test_\w+\.py", INDEX)
    upstream = re.findall(r"(?:^|[ (])`?tests/v1/\S*", INDEX)
    inside_upstream = sum(len(re.findall(r"test_\w+\.py", path)) for path in upstream)
    checked = re.findall(r"`(?:engine|unit)/(?:\w+/)*test_\w+\.py(?:::\w+)?`", INDEX)
    assert len(mentions) == len(checked) + inside_upstream
