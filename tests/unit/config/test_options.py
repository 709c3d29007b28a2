# SPDX-License-Identifier: Apache-2.0
"""Catch a bad ``speculative_config`` that slips through to the engine, a good one that is
refused, and an error message that leaves the user without a way out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_layerskip.config.options import (
    VALID_KEYS,
    VLLM_KEYS,
    resolve_options,
)

NUM_LAYERS = 4
GOOD = {"method": "layerskip", "exit_layer": 2, "num_speculative_tokens": 3}
BLOCK = {"exit_layer": 1, "num_speculative_tokens": 5, "recipe": {"rotation": 8}}

LAYERS = "an integer from 1 to 3 (the model has 4 layers)"
TOKENS = "an integer of at least 1"
USER, FILE = "speculative_config: ", "config.json, 'layerskip' block: "

# Changes to GOOD, the checkpoint's block, and what the error must say.
BAD = [
    *[
        ({"exit_layer": value}, None, (f"{USER}exit_layer={value!r} must be {LAYERS} or 'auto'",))
        for value in (0, -1, NUM_LAYERS, 99, 2.0, "2", "", "last", True, False, [2])
    ],
    *[
        (
            {"num_speculative_tokens": value},
            None,
            (f"{USER}num_speculative_tokens={value!r} must be {TOKENS}",),
        )
        for value in (0, -5, True, False, "3", 3.0, [3])
    ],
    *[
        ({"reuse_exit_states": value}, None, (f"reuse_exit_states={value!r}", "true or false"))
        for value in (0, 1, "true", "no", None)
    ],
    *[
        ({key: 1}, None, (key, "cannot be used with LayerSkip", "Remove", *sorted(VALID_KEYS)))
        for key in (
            "draft_tensor_parallel_size",
            "prompt_lookup_max",
            "exit_layers",
            "quantization",
        )
    ],
    *[
        (
            {"exit_layer": "auto"},
            block,
            ("exit_layer='auto'", "'layerskip' block", "--exit-layer", LAYERS, "--hf-overrides"),
        )
        for block in (None, {}, {"num_speculative_tokens": 5})
    ],
    *[
        (
            {"num_speculative_tokens": None},
            block,
            (
                "num_speculative_tokens",
                "not set",
                "--num-speculative-tokens",
                TOKENS,
                "--hf-overrides",
            ),
        )
        for block in (None, {}, {"exit_layer": 2})
    ],
    *[
        ({}, block, ("config.json", "'layerskip' must be an object", repr(block), "Correct"))
        for block in (3, "2", [2, 5], True)
    ],
    *[
        ({"exit_layer": "auto"}, {"exit_layer": value}, (f"{FILE}exit_layer={value!r}", LAYERS))
        for value in (0, NUM_LAYERS, "2", 1.0, True, None)
    ],
    *[
        (
            {"num_speculative_tokens": None},
            {"num_speculative_tokens": value},
            (f"{FILE}num_speculative_tokens={value!r}", TOKENS),
        )
        for value in (0, "5", False, None)
    ],
]
BAD += [
    *[
        (
            {"draft_quantization": value},
            None,
            (f"{USER}draft_quantization={value!r}", "'int4', 'int8', 'fp8', 'none'", "'auto'"),
        )
        for value in ("int2", "INT4", 4, True, "", ["int4"])
    ],
    (
        {},
        {**BLOCK, "draft_quantization": "int3"},
        (f"{FILE}draft_quantization='int3'", "'int4'", "--draft-quantization none"),
    ),
    *[
        ({"exit_layer": value}, None, (f"exit_layer={value!r}", "draft_quantization", "'int8'"))
        for value in ("all", NUM_LAYERS)
    ],
    *[
        (
            {"exit_layer": value, "draft_quantization": "int8"},
            None,
            (f"exit_layer={value!r} must be an integer from 1 to 4", "'all' for every layer"),
        )
        for value in (0, NUM_LAYERS + 1, "last", 2.0, True)
    ],
    *[
        (
            {"reuse_exit_states": True, key: value},
            None,
            ("reuse_exit_states=True cannot go with", f"{key}={value!r}", "Leave"),
        )
        for key, value in (("draft_quantization", "int4"), ("draft_adapter", "folder"))
    ],
    (
        {"reuse_exit_states": True},
        {**BLOCK, "draft_quantization": "fp8"},
        (f"cannot go with {FILE}draft_quantization='fp8'",),
    ),
    *[
        ({"draft_adapter": value}, None, (f"{USER}draft_adapter={value!r}", "folder of a LoRA"))
        for value in ("", 3, True)
    ],
    *[
        ({}, {"draft_adapter": value}, (f"{FILE}draft_adapter={value!r}", "--draft-adapter none"))
        for value in ("/a", "../a", 3)
    ],
    (
        {"exit_layer": "auto"},
        None,
        ("--exit-layer all --draft-quantization int4", "not trained for early exit"),
    ),
]


def _id(value):
    return repr(value)[:70] if isinstance(value, dict) else None


@pytest.mark.parametrize(("changes", "block", "says"), BAD, ids=_id)
def test_a_bad_option_is_refused_by_name_value_valid_set_and_remedy(changes, block, says):
    with pytest.raises(ValueError, match="config") as error:
        resolve_options(GOOD | changes, NUM_LAYERS, block)
    for words in says:
        assert words in str(error.value)


def test_options_reach_the_result_as_they_were_given():
    options = resolve_options(GOOD | {"reuse_exit_states": False}, NUM_LAYERS, BLOCK)
    assert options.exit_layer == 2
    assert options.num_speculative_tokens == 3
    assert options.reuse_exit_states is False
    assert options.vllm_options == {}


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({}, (1, 5)),
        ({"exit_layer": "auto"}, (1, 5)),
        ({"exit_layer": None, "num_speculative_tokens": None}, (1, 5)),
        ({"exit_layer": "auto", "num_speculative_tokens": "auto"}, (1, 5)),
        ({"exit_layer": 3}, (3, 5)),
        ({"num_speculative_tokens": 2}, (1, 2)),
    ],
    ids=repr,
)
def test_what_the_user_left_open_comes_from_the_checkpoint(request_, expected):
    options = resolve_options({"model": "[self]"} | request_, NUM_LAYERS, BLOCK)
    assert (options.exit_layer, options.num_speculative_tokens) == expected
    assert options.reuse_exit_states is True


def test_a_bad_value_in_the_checkpoint_does_not_matter_once_the_user_gave_a_good_one():
    options = resolve_options(GOOD, NUM_LAYERS, {"exit_layer": 99, "num_speculative_tokens": 0})
    assert (options.exit_layer, options.num_speculative_tokens) == (2, 3)


def test_vllms_own_keys_pass_through_unchanged():
    vllm_options = {key: object() for key in VLLM_KEYS}
    assert resolve_options(GOOD | vllm_options, NUM_LAYERS, None).vllm_options == vllm_options


def test_every_key_that_passes_through_is_a_field_of_vllms_config():
    from dataclasses import fields

    from vllm.config.speculative import SpeculativeConfig

    assert {field.name for field in fields(SpeculativeConfig)} >= VLLM_KEYS


@given(exit_layer=st.integers(-3, 50), num_layers=st.integers(2, 40))
def test_exit_layer_is_accepted_exactly_from_1_to_the_last_layer_but_one(exit_layer, num_layers):
    for request, block in (
        (GOOD | {"exit_layer": exit_layer}, None),
        (GOOD | {"exit_layer": "auto"}, {"exit_layer": exit_layer}),
    ):
        if exit_layer in range(1, num_layers):
            assert resolve_options(request, num_layers, block).exit_layer == exit_layer
        else:
            with pytest.raises(ValueError, match=rf"={exit_layer} .* to {num_layers - 1} "):
                resolve_options(request, num_layers, block)


SCHEDULE = [[1, 4, 5], [5, 16, 2], [17, 64, 0]]
TUNED = BLOCK | {"num_speculative_tokens_per_batch_size": SCHEDULE}


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({}, [(1, 4, 5), (5, 16, 2), (17, 64, 0)]),
        ({"exit_layer": "auto"}, [(1, 4, 5), (5, 16, 2), (17, 64, 0)]),
        ({"num_speculative_tokens": None}, [(1, 4, 5), (5, 16, 2), (17, 64, 0)]),
        # The schedule was tuned for the checkpoint's pair; setting E or K overrides it.
        ({"exit_layer": 1}, None),
        ({"num_speculative_tokens": 5}, None),
        ({"num_speculative_tokens": 2}, None),
        ({"num_speculative_tokens_per_batch_size": [(1, 8, 3)]}, [(1, 8, 3)]),
    ],
    ids=repr,
)  # fmt: skip
def test_the_checkpoints_schedule_belongs_to_its_own_e_and_k(request_, expected):
    options = resolve_options({"model": "[self]"} | request_, NUM_LAYERS, TUNED)
    assert options.vllm_options.get("num_speculative_tokens_per_batch_size") == expected


def test_a_request_for_no_schedule_gets_none():
    request = {"model": "[self]", "num_speculative_tokens_per_batch_size": None}
    options = resolve_options(request, NUM_LAYERS, TUNED)
    assert options.vllm_options == {"num_speculative_tokens_per_batch_size": None}
    assert options.num_speculative_tokens == 5


@pytest.mark.parametrize(
    "schedule",
    [
        None, [], {}, 5, "1-4", [1, 4, 5], [[1, 4]], [[1, 4, 5, 6]], [[2, 4, 5]], [[0, 4, 5]],
        [[1, 4, -1]], [[4, 1, 5]], [[1, 4, 5], [4, 8, 2]], [[5, 8, 2], [1, 4, 5]], [[1, 4, 5.0]],
        [[1, True, 5]], [["1", 4, 5]],
    ],
    ids=repr,
)  # fmt: skip
def test_a_bad_schedule_in_the_checkpoint_is_refused(schedule):
    block = BLOCK | {"num_speculative_tokens_per_batch_size": schedule}
    with pytest.raises(ValueError, match="config.json, 'layerskip' block") as error:
        resolve_options({"model": "[self]"}, NUM_LAYERS, block)
    for words in ("num_speculative_tokens_per_batch_size", repr(schedule), "vllm-layerskip tune"):
        assert words in str(error.value)


@given(
    st.lists(
        st.tuples(st.integers(-1, 9), st.integers(-1, 9), st.integers(-1, 4)).map(list),
        min_size=1,
        max_size=4,
    )
)
def test_a_schedule_is_accepted_only_if_vllm_accepts_it(schedule):
    from vllm.v1.spec_decode.dynamic.utils import validate_and_normalize_dynamic_sd_schedule

    from vllm_layerskip.config.options import checked_schedule

    try:
        ours = checked_schedule(schedule, "here")
    except ValueError:
        return
    assert ours == validate_and_normalize_dynamic_sd_schedule(schedule)


@pytest.mark.parametrize(
    ("changes", "block", "expected"),
    [
        ({}, None, ("none", None, False)),
        ({"draft_quantization": "int4"}, None, ("int4", None, True)),
        ({"draft_quantization": "auto"}, {"draft_quantization": "int4"}, ("int4", None, True)),
        ({"draft_quantization": None}, {"draft_quantization": "int4"}, ("int4", None, True)),
        ({}, {"draft_quantization": "fp8", "draft_adapter": "a"}, ("fp8", ("a", True), True)),
        ({"draft_quantization": "none"}, {"draft_quantization": "int4"}, ("none", None, False)),
        ({"draft_quantization": "int8"}, {"draft_quantization": "int4"}, ("int8", None, True)),
        ({"draft_adapter": "b"}, {"draft_adapter": "a"}, ("none", ("b", False), True)),
        ({"draft_adapter": "none"}, {"draft_adapter": "a"}, ("none", None, False)),
    ],
)
def test_a_twin_is_the_requests_or_the_checkpoints(changes, block, expected):
    options = resolve_options(GOOD | changes, NUM_LAYERS, block)
    adapter = options.draft_adapter
    found = adapter and (adapter.path, adapter.in_checkpoint)
    assert (options.draft_quantization, found, options.has_twin) == expected
    assert options.reuse_exit_states is not options.has_twin


@pytest.mark.parametrize("value", ["all", NUM_LAYERS])
def test_all_layers_may_draft_in_fewer_bits(value):
    changes = {"exit_layer": value, "draft_quantization": "int4"}
    assert resolve_options(GOOD | changes, NUM_LAYERS, None).exit_layer == NUM_LAYERS
    block = {"exit_layer": value, "num_speculative_tokens": 4, "draft_quantization": "int4"}
    assert resolve_options({"model": "[self]"}, NUM_LAYERS, block).exit_layer == NUM_LAYERS
