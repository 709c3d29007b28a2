# SPDX-License-Identifier: Apache-2.0
"""Answers of a real model with LayerSkip are plain vLLM's and transformers', token for token.

Catches what a model of 3 million parameters or of random weights cannot show: drafts of 30 layers,
of a vocabulary of 49152, of a model that was not trained for early exit, and acceptance that is
worth something.
"""

from __future__ import annotations

import pytest
import torch
from checkpoints import load_reference
from vllm import SamplingParams

from vllm_layerskip.example_model.drafts import FOLDER, shipped_drafts
from vllm_layerskip.twins.adapter_config import read_record

QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "A train goes 60 km in one hour. How far does it go in 3 hours?",
    "Rewrite this politely: Send me the report now.",
    "Write a short story about a lighthouse keeper.",
    "Translate to German: The weather is nice today.",
    "Name three colors, separated by commas.",
    "Is a whale a fish? Answer yes or no, then explain.",
)
MAX_TOKENS = 20
GREEDY = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
SMALLEST_MARGIN = 0.01
"""Between the two best logits of a step: float32 rounds a thousand times finer."""
SETTINGS = {"max_model_len": 512, "max_num_seqs": 8, "kv_cache_memory_bytes": 64 << 20}


def own_layers(exit_layer: int) -> dict:
    return {"exit_layer": exit_layer, "num_speculative_tokens": 4, "draft_quantization": "none"}


AS_THE_FOLDER_SAYS: dict = {}
"""Its config.json: all layers in int4, K = 4."""
ADAPTED = [draft.name for draft in shipped_drafts()]


@pytest.fixture(scope="module")
def prompts(ask):
    return [ask(question) for question in QUESTIONS]


@pytest.fixture(scope="module")
def plain(pool, example):
    return pool.get(example, **SETTINGS)


@pytest.fixture(scope="module")
def layerskip(pool, example):
    """An engine by its ``speculative_config``."""

    def engine(spec):
        return pool.get(example, speculative_config={"method": "layerskip", **spec}, **SETTINGS)

    return engine


@pytest.fixture(scope="module")
def expected(plain, prompts):
    return plain.generate(prompts, GREEDY)


@pytest.fixture(scope="module")
def drafted(layerskip, prompts, expected):
    """What an engine drafts for all questions; its tokens must be plain vLLM's."""
    found = {}

    def counts(spec):
        key = repr(spec)
        if key not in found:
            engine = layerskip(spec)
            engine.reset_prefix_cache()
            with engine.counting() as counted:
                assert engine.generate(prompts, GREEDY) == expected
            counted.assert_speculated()
            found[key] = counted
        return found[key]

    return counts


def test_plain_answers_are_transformers(example, prompts, expected):
    """Its own ``generate``, eager: the reference that shares no code with vLLM."""
    reference = load_reference(example)
    reference.set_attn_implementation("eager")
    end = reference.config.eos_token_id
    width = max(map(len, prompts))
    ids = torch.tensor([[end] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    generated = reference.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=MAX_TOKENS,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    answers = [until(end, row) for row in generated.sequences[:, width:].tolist()]
    assert answers == expected
    best, second = torch.stack(generated.scores, 1).topk(2).values.unbind(-1)
    margins = [
        (best - second)[row, : len(answer)].min().item() for row, answer in enumerate(answers)
    ]
    assert min(margins) > SMALLEST_MARGIN, "rounding may decide: ask other questions"


def until(end: int, row: list[int]) -> list[int]:
    return row[: row.index(end) + 1] if end in row else row


def test_answers_are_sensible_and_end(tokenizer, expected):
    """Not every model that gives equal tokens is one that was read right."""
    texts = tokenizer.batch_decode(expected, skip_special_tokens=True)
    assert "Paris" in texts[0]
    assert "def fibonacci(n):" in texts[1]
    assert expected[6][-1] == tokenizer.eos_token_id
    assert len(expected[6]) < MAX_TOKENS


def test_int4_drafts_of_all_layers_are_accepted(layerskip, drafted):
    counts = drafted(AS_THE_FOLDER_SAYS)
    config = layerskip(AS_THE_FOLDER_SAYS).vllm_config.speculative_config
    assert (config.exit_layer, config.num_speculative_tokens) == (30, 4)
    assert counts.acceptance_length > 2.5
    assert counts.num_verify_steps_reused == 0
    assert counts.num_verify_steps_full > 0


def test_early_layers_that_were_not_trained_for_it(drafted):
    """Some drafts are accepted, and verification starts from their exit states."""
    counts = drafted(own_layers(12))
    assert counts.acceptance_length < 1.5
    assert counts.num_verify_steps_reused > 0


def test_late_exits_are_accepted_and_very_early_ones_are_not(drafted):
    late, early = drafted(own_layers(28)), drafted(own_layers(2))
    assert late.acceptance_length > 1.5
    assert late.num_verify_steps_reused > 0
    assert early.acceptance_length < 1.2 < late.acceptance_length


@pytest.mark.parametrize(
    "name", ADAPTED or [pytest.param("", marks=pytest.mark.skip("none ships"))]
)
def test_a_shipped_adapter_makes_better_drafts(example, drafted, name):
    folder = example / FOLDER / name
    exit_layer = read_record(folder).exit_layer
    assert exit_layer is not None
    options = {
        "draft_adapter": str(folder),
        "draft_vocab": str(folder / "draft_vocab.json"),
        "exit_layer": exit_layer,
    }
    adapted = drafted(own_layers(exit_layer) | options)
    own = drafted(own_layers(exit_layer))
    assert adapted.acceptance_length > own.acceptance_length + 0.3
    assert adapted.num_verify_steps_reused == 0


def test_sampled_answers_can_be_repeated(layerskip, prompts):
    """At temperature 0.7 (tests/engine/exactness/test_sampling.py has the distribution)."""
    engine = layerskip(AS_THE_FOLDER_SAYS)

    def answers(*seeds):
        params = [
            SamplingParams(temperature=0.7, max_tokens=12, seed=seed, ignore_eos=True)
            for seed in seeds
        ]
        engine.reset_prefix_cache()
        return engine.generate([prompts[4]] * len(seeds), params)

    with engine.counting() as counts:
        first, other = answers(1, 2)
        assert answers(1) == [first]
    assert first != other
    counts.assert_speculated()
    assert counts.num_accepted_tokens < counts.num_draft_tokens
