# SPDX-License-Identifier: Apache-2.0
"""Questions in Spec-Bench's form are told from others."""

import pytest

from vllm_layerskip.files.turns import is_text, turns_of


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        ({"turns": ["a", "b"]}, ("a", "b")),
        ({"turns": []}, ()),
        ({"turns": "ab"}, ()),
        ({"turns": ["a", " "]}, ()),
        ({"turns": ["a", 3]}, ()),
        ({"prompt": "a"}, ()),
    ],
)
def test_turns_are_all_texts_or_none(record, turns):
    assert turns_of(record) == turns


def test_white_space_is_no_text():
    assert is_text(" a\n")
    assert not any(map(is_text, ["", " \n\t", None, 3, ["a"]]))
