# SPDX-License-Identifier: Apache-2.0
"""Catch exits of a twin that are read at other layers, tokens or weights than its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import vllm_layerskip
from vllm_layerskip.evaluation.predictions import generate_greedily, measure_agreement
from vllm_layerskip.evaluation.twin import make_twin
from vllm_layerskip.tuning.twin_agreement import measure_twin_agreement

MODEL = Path(vllm_layerskip.__file__).parent / "checkpoint"
PROMPTS = [[1, 5, 9, 30], [1, 7], [1, 40, 41, 42, 43, 44]]
EXITS = (3, 6, 9, 12)


def load():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model():
    return load()


@pytest.fixture(scope="module")
def answers(model):
    return [*generate_greedily(model, PROMPTS, 24, ()), [5]]


def test_a_twin_without_rounding_agrees_as_the_target_does_and_in_full_at_the_last(model, answers):
    prompts = [*PROMPTS, [1]]  # The last answer is too short for a draft.
    matches = measure_twin_agreement(model, prompts, answers, EXITS)
    target = measure_agreement(model, prompts, answers, EXITS[:3])
    assert len(matches) == len(target.matches) == 3
    for rows, of_target in zip(matches, target.matches, strict=True):
        assert (rows[:3] == of_target).all()
        assert rows[3].all()


def test_fewer_bits_agree_less_and_spoiled_weights_not_at_all(model, answers):
    rates = {}
    for kind in ("int8", "int4"):
        twin = load()
        make_twin(twin, kind, None)
        matches = measure_twin_agreement(twin, PROMPTS, answers[:3], (12,))
        rates[kind] = np.concatenate(matches, axis=1).mean()
    spoiled = load()
    for parameter in spoiled.model.layers.parameters():
        parameter.data.normal_()
    matches = measure_twin_agreement(spoiled, PROMPTS, answers[:3], (12,))
    assert np.concatenate(matches, axis=1).mean() < 0.3 < rates["int4"] <= rates["int8"]


def test_a_draft_vocabulary_limits_every_exit(model, answers):
    vocab = sorted({token for answer in answers[:1] for token in answer})
    whole = measure_twin_agreement(model, PROMPTS, answers[:3], (12,), vocab)
    assert whole[0].all()
    (none,) = measure_twin_agreement(model, PROMPTS[:1], answers[:1], (12,), [vocab[-1] + 1])
    assert not none.any()
