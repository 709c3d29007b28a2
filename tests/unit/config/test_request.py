# SPDX-License-Identifier: Apache-2.0
"""Catch a request that is wrongly taken for LayerSkip's, or not, or that contradicts itself."""

import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_layerskip.config.request import (
    OWN_KEYS,
    asks_for_layerskip,
    speculative_request,
    with_option,
)

OURS = [
    {"method": "layerskip"},
    {"method": "layerskip", "model": None},
    {"method": "layerskip", "model": "[self]"},
    {"model": "[self]"},
    {"model": "[self]", "method": None, "exit_layer": 2},
]
NOT_OURS = [
    None,
    {},
    {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4},
    {"method": "eagle3", "model": "org/head", "num_speculative_tokens": 3},
    {"model": "org/draft", "num_speculative_tokens": 3, "draft_tensor_parallel_size": 1},
    {"num_speculative_tokens": 3},
]
# A request that mixes LayerSkip with something else, and what its error must say.
MIXED = [
    ({"method": "ngram", "model": "[self]"}, ("'[self]'", "method='ngram'", "Leave method out")),
    (
        {"method": "layerskip", "model": "org/draft"},
        ("model='org/draft'", "method='layerskip'", "Leave model out", "'[self]'"),
    ),
    ({"exit_layer": 2}, ("exit_layer", "method='layerskip'", "model='[self]'", "drop the option")),
    (
        {"method": "ngram", "reuse_exit_states": False},
        ("reuse_exit_states", "method='layerskip'", "--spec-model '[self]'", "drop the option"),
    ),
]


def _id(value):
    return repr(value)[:70] if isinstance(value, dict) else None


@pytest.mark.parametrize("request_", OURS, ids=repr)
def test_a_request_that_names_layerskip_is_ours(request_):
    assert asks_for_layerskip(request_) is True


@pytest.mark.parametrize("request_", NOT_OURS, ids=repr)
def test_a_plain_request_is_not_ours(request_):
    assert asks_for_layerskip(request_) is False


@given(
    st.dictionaries(
        st.text(max_size=12).filter(lambda key: key not in OWN_KEYS | {"method", "model"}),
        st.none() | st.integers() | st.text(max_size=12),
    ),
    st.sampled_from([None, "ngram", "eagle3", "draft_model", "mtp"]),
    st.sampled_from([None, "org/draft", "itself", "layerskip"]),
)
def test_a_request_without_our_words_is_never_ours_whatever_else_it_holds(rest, method, model):
    assert asks_for_layerskip(rest | {"method": method, "model": model}) is False


@pytest.mark.parametrize(("request_", "says"), MIXED, ids=_id)
def test_a_mixed_request_is_refused_with_a_remedy(request_, says):
    with pytest.raises(ValueError, match="speculative_config") as error:
        asks_for_layerskip(request_)
    for words in says:
        assert words in str(error.value)


@pytest.mark.parametrize("model", ["self", ["self"]])
@pytest.mark.parametrize("method", [None, "layerskip"])
def test_brackets_that_yaml_took_away_are_asked_for(model, method):
    with pytest.raises(ValueError, match=r"""quotes \(speculative-model: "\[self\]"\)""") as error:
        asks_for_layerskip({"model": model, "method": method})
    assert f"model={model!r}" in str(error.value)


def test_a_draft_model_in_a_folder_called_self_is_vllms(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "self").mkdir()
    assert asks_for_layerskip({"model": "self"}) is False
    assert asks_for_layerskip({"model": "self", "method": "eagle3"}) is False


def test_a_file_with_quotes_asks_for_layerskip_and_one_without_is_told(tmp_path):
    """Through vLLM's own reader of `vllm serve --config FILE`."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    for text, model in (('"[self]"', "[self]"), ("[self]", "self")):
        file = tmp_path / "serve.yaml"
        file.write_text(f"speculative-model: {text}\n")
        parser = FlexibleArgumentParser()
        parser.add_argument("--speculative-model")
        parser.add_argument("--config")
        assert parser.parse_args(["--config", str(file)]).speculative_model == model


def _engine_args(config, method=None, model=None, tokens=None):
    return types.SimpleNamespace(
        speculative_config=config, spec_method=method, spec_model=model, spec_tokens=tokens
    )


def test_flags_and_keys_become_one_request_in_one_spelling():
    given_ = {"exit-layer": 2, "draft_vocab": "auto"}
    args = _engine_args(given_, model="[self]", tokens=4)
    assert speculative_request(args) == {
        "exit_layer": 2,
        "draft_vocab": "auto",
        "model": "[self]",
        "num_speculative_tokens": 4,
    }
    assert given_ == {"exit-layer": 2, "draft_vocab": "auto"}, "the user's arguments were changed"
    assert speculative_request(_engine_args(None)) == {}


@pytest.mark.parametrize("key", ["num_speculative_tokens", "num-speculative-tokens"])
def test_a_key_given_both_ways_is_an_error_in_either_spelling(key):
    with pytest.raises(ValueError, match=r"--spec-tokens and .*mutually exclusive\. Give one"):
        speculative_request(_engine_args({key: 3}, tokens=4))
    with pytest.raises(ValueError, match=r"--flag and .*mutually exclusive\. Give one"):
        with_option({key: 3}, "num_speculative_tokens", 4, "--flag")
