# SPDX-License-Identifier: Apache-2.0
"""Catch a traceback instead of an explanation, and a stop token that is left out."""

import json
from pathlib import Path

import pytest

import vllm_layerskip
from vllm_layerskip.errors import UserError
from vllm_layerskip.files.tokenizers import load_tokenizer, stop_token_ids

MODEL = Path(vllm_layerskip.__file__).parent / "checkpoint"


def test_a_checkpoints_tokenizer_is_loaded_with_the_options():
    tokenizer = load_tokenizer(str(MODEL), "--model", padding_side="left")
    assert tokenizer.padding_side == "left"
    text = "import os\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


@pytest.mark.parametrize("name", ["no", "empty", "broken"])
def test_without_a_tokenizer_the_option_its_value_and_the_remedy_are_named(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer_config.json").write_text("{")
    model = str(tmp_path / name)
    with pytest.raises(UserError) as raised:
        load_tokenizer(model, "--judge")
    message = str(raised.value)
    assert message.startswith(f"--judge {model}: no tokenizer could be read (")
    assert message.endswith("a folder with the tokenizer's files, or a name on the model hub.")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("ends", "expected"), [(7, (7,)), ([9, 7, 7], (7, 9)), (None, ()), ([], ())]
)
def test_stop_tokens_come_from_the_generation_config(tmp_path, ends, expected):
    content = {} if ends is None else {"eos_token_id": ends}
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    assert stop_token_ids(str(tmp_path), otherwise=3) == expected


@pytest.mark.parametrize(("otherwise", "expected"), [(3, (3,)), ([5, 3], (3, 5)), (None, ())])
def test_without_a_generation_config_stop_tokens_are_the_given_ones(tmp_path, otherwise, expected):
    assert stop_token_ids(str(tmp_path), otherwise) == expected
