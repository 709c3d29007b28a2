# SPDX-License-Identifier: Apache-2.0
"""Catch a tokenizer that loses text or adds tokens of its own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unit.training.training_runs import small_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@given(st.text(max_size=60))
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_encoding_adds_no_token_of_its_own(tokenizer):
    ids = tokenizer("import os\n")["input_ids"]
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids[:1]).startswith("i")


def test_a_chat_begins_with_one_bos_and_holds_the_messages(tokenizer):
    messages = [{"role": "user", "content": "import os"}, {"role": "user", "content": "import sys"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<s>import os\nimport sys\n"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
