# SPDX-License-Identifier: Apache-2.0
"""vLLM's counts of drafts and accepted tokens are what the answers say (docs/tests.md, T25).

Every verification gives a request its accepted drafts and one token more, so the counts of a
request add up to its tokens. Catches drafts that are counted twice, at a wrong position or not
at all, and a stop (here: EOS) that is overlooked inside of accepted drafts.
"""

from __future__ import annotations

import collections
import json
import shutil

import pytest
from vllm import SamplingParams
from vllm.inputs import TokensPrompt

NUM_SPECULATIVE_TOKENS = 5


def generate(engine, prompts, params):
    inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    return engine.llm.generate(inputs, params, use_tqdm=False)


def num_tokens_behind_the_end(output, counts):
    """Tokens that verification yielded and the request's end cut off."""
    # The prefill gives a token, each verification its accepted drafts and one more.
    verified = sum(accepted + 1 for _, accepted in counts.of_request(output.request_id))
    return 1 + verified - len(output.outputs[0].token_ids)


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
def test_counts_add_up_to_the_tokens(pool, checkpoint, prompts, async_scheduling):
    engine = pool.layerskip(
        checkpoint, 3, NUM_SPECULATIVE_TOKENS, async_scheduling=async_scheduling
    )
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    with engine.counting() as counts:
        outputs = generate(engine, prompts, params)
    counts.assert_speculated()
    assert len(set(counts.request_ids)) == len(prompts)
    assert {drafted for drafted, _ in counts.drafts} == {NUM_SPECULATIVE_TOKENS}
    for output in outputs:
        assert 0 <= num_tokens_behind_the_end(output, counts) <= NUM_SPECULATIVE_TOKENS


def test_prometheus_counters_are_the_schedulers(pool, checkpoint, prompts):
    # Counters are those of the process's newest engine: no other test has these settings.
    engine = pool.layerskip(checkpoint, 3, NUM_SPECULATIVE_TOKENS, max_num_seqs=3)

    def read():
        metrics = {metric.name: metric for metric in engine.llm.get_metrics()}
        prefix = "vllm:spec_decode_num_"
        return [
            metrics[f"{prefix}drafts"].value,
            metrics[f"{prefix}draft_tokens"].value,
            metrics[f"{prefix}accepted_tokens"].value,
            *metrics[f"{prefix}accepted_tokens_per_pos"].values,
        ]

    before = read()
    with engine.counting() as counts:
        engine.greedy(prompts, max_tokens=40)
    counts.assert_speculated()
    assert [after - first for after, first in zip(read(), before, strict=True)] == [
        counts.num_drafts,
        counts.num_draft_tokens,
        counts.num_accepted_tokens,
        *counts.accepted_per_position,
    ]
    assert len(counts.accepted_per_position) == NUM_SPECULATIVE_TOKENS
    assert counts.accepted_per_position == sorted(counts.accepted_per_position, reverse=True)


@pytest.fixture(scope="module")
def frequent_eos(pool, checkpoint, prompts, tokenizer, tmp_path_factory):
    """The checkpoint with another end-of-sequence token: one that is frequent in its answers."""
    answers = pool.get(checkpoint).greedy(prompts, max_tokens=60)
    tokens = collections.Counter(token for answer in answers for token in set(answer[4:]))
    folder = tmp_path_factory.mktemp("eos") / "model"
    shutil.copytree(checkpoint, folder)
    path = folder / "tokenizer_config.json"
    eos = tokenizer.convert_ids_to_tokens(tokens.most_common(1)[0][0])
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": eos}))
    return folder


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
def test_eos_inside_of_accepted_drafts(pool, frequent_eos, prompts, async_scheduling):
    # Many requests, so that some accept drafts after EOS.
    batch = [prompt[: len(prompt) - cut] for prompt in prompts for cut in range(4)]
    params = SamplingParams(temperature=0, max_tokens=60)
    expected = generate(pool.get(frequent_eos), batch, params)
    engine = pool.layerskip(
        frequent_eos, 3, NUM_SPECULATIVE_TOKENS, async_scheduling=async_scheduling
    )
    with engine.counting() as counts:
        outputs = generate(engine, batch, params)
    counts.assert_speculated()
    for output, plain in zip(outputs, expected, strict=True):
        choice, plain_choice = output.outputs[0], plain.outputs[0]
        assert choice.token_ids == plain_choice.token_ids
        assert choice.text == plain_choice.text
        assert (choice.finish_reason, choice.stop_reason) == (
            plain_choice.finish_reason,
            plain_choice.stop_reason,
        )
    ended = [output for output in outputs if output.outputs[0].finish_reason == "stop"]
    assert len(ended) > 5
    behind = [num_tokens_behind_the_end(output, counts) for output in ended]
    assert max(behind) > 0, "no EOS lay inside of accepted drafts"
    # vLLM counts what verification accepted, also after a request's end: at most K a request.
    assert min(behind) >= 0
    assert max(behind) <= NUM_SPECULATIVE_TOKENS
