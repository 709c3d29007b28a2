# SPDX-License-Identifier: Apache-2.0
"""Catch an error of a library that loses its words, or a missing package without a remedy."""

import pytest

from vllm_layerskip.errors import UserError, first_line, needs_extra, one_line


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("no such file.\nTraceback"), "no such file"),
        (OSError(2, "No such file", "x"), "[Errno 2] No such file: 'x'"),
        (KeyError(), "KeyError"),
        (ValueError("  \n"), "ValueError"),
    ],
)
def test_the_first_line_of_an_error(error, expected):
    assert first_line(error) == expected


def test_a_missing_package_names_the_extra():
    message = r"'no_such'.*pip install 'vllm-layerskip\[train\]'"
    with pytest.raises(UserError, match=message), needs_extra("train"):
        import no_such  # noqa: F401


def test_another_error_stays_what_it_is():
    with pytest.raises(ZeroDivisionError), needs_extra("train"):
        1 / 0  # noqa: B018


def test_a_missing_module_of_ours_is_a_bug_and_no_missing_package():
    with pytest.raises(ImportError), needs_extra("train"):
        from vllm_layerskip.errors import no_such  # noqa: F401


def test_an_error_of_many_lines_in_one():
    assert one_line(ValueError("no such\n  file\n")) == "no such file"
    assert one_line(KeyError()) == "KeyError"
