# SPDX-License-Identifier: Apache-2.0
"""Draft twins: whatever weights the drafts have, tokens are plain decoding's.

A draft pass of a twin writes K/V that are not the target's. Catches a draft's K/V that verification
does not overwrite, one that reaches the prefix cache or another request, and a step that starts
from a twin's exit states.
"""

from __future__ import annotations

import time

import pytest
import torch
from checkpoints import random_llama
from engines import EnginePool
from families import FAMILIES, WINDOW, random_checkpoint
from features import FEATURES, SAMPLED
from test_families import SLOW
from test_feature_matrix import SCHEDULING, SETTINGS, ask
from test_max_model_len import MAX_MODEL_LEN, run_to_the_end
from test_prefix_cache import cached_tokens, recorded_batches
from test_sampling import assert_drawn_from, exact_distribution, sample
from twins import speculating, spoil, twin_engine, twins_without_rounding

BLOCK_SIZE = 32
ALL = "all"
NUM_LAYERS = 12
RANDOM_PROMPTS = [[0, *range(3, 3 + length)] for length in (1, 9, 31, 32)]


pytestmark = pytest.mark.usefixtures("many_small_engines")


@pytest.mark.parametrize(
    ("exit_layer", "num_speculative_tokens"),
    [
        (1, 1),
        (1, 4),
        pytest.param(1, 7, marks=pytest.mark.slow),
        pytest.param(NUM_LAYERS // 2, 1, marks=pytest.mark.slow),
        (NUM_LAYERS // 2, 4),
        pytest.param(NUM_LAYERS // 2, 7, marks=pytest.mark.slow),
        (ALL, 1),
        (ALL, 4),
        (ALL, 7),
    ],
)
def test_mixed_lengths_and_more_requests_than_slots(
    pool, checkpoint, prompts, exit_layer, num_speculative_tokens
):
    expected = pool.get(checkpoint).greedy(prompts, max_tokens=24)
    engine = twin_engine(pool, checkpoint, exit_layer, num_speculative_tokens)
    with speculating(engine) as counts:
        assert engine.greedy(prompts, max_tokens=24) == expected
    assert counts.num_verify_steps_full > 0
    assert counts.num_accepted_tokens < counts.num_draft_tokens
    if exit_layer == ALL:
        assert counts.num_accepted_tokens > 0.5 * counts.num_draft_tokens


@pytest.mark.parametrize(("kind", "exit_layer"), [("int8", ALL), ("fp8", NUM_LAYERS // 2)])
def test_other_kinds(pool, checkpoint, prompts, kind, exit_layer):
    expected = pool.get(checkpoint).greedy(prompts, max_tokens=24)
    engine = twin_engine(pool, checkpoint, exit_layer, 4, kind)
    with speculating(engine):
        assert engine.greedy(prompts, max_tokens=24) == expected


@pytest.mark.parametrize("exit_layer", [1, ALL])
def test_rejections_on_random_weights(pool, random_checkpoint, exit_layer):
    expected = pool.get(random_checkpoint).greedy(RANDOM_PROMPTS, max_tokens=100)
    engine = twin_engine(pool, random_checkpoint, exit_layer, 4)
    with speculating(engine) as counts:
        assert engine.greedy(RANDOM_PROMPTS, max_tokens=100) == expected
    assert counts.num_draft_tokens - counts.num_accepted_tokens > 50


def test_a_spoiled_twin_loses_acceptance_and_no_token(pool, checkpoint, prompts):
    expected = pool.get(checkpoint).greedy(prompts[:3], max_tokens=30)
    engine = twin_engine(pool, checkpoint, ALL, 3)
    with speculating(engine) as healthy:
        assert engine.greedy(prompts[:3], max_tokens=30) == expected
    spoil(engine)
    engine.reset_prefix_cache()
    with engine.counting() as spoiled:
        assert engine.greedy(prompts[:3], max_tokens=30) == expected
    assert spoiled.num_drafts > 50
    assert spoiled.acceptance_length < 1.2 < 2.5 < healthy.acceptance_length


@pytest.mark.parametrize("exit_layer", [2, ALL])
def test_a_twin_that_equals_the_target_accepts_every_draft(tmp_path, exit_layer):
    """With two layers of four, the others add nothing."""
    model = random_llama(tmp_path / "model", identity_from=None if exit_layer == ALL else 2)
    pool = EnginePool()
    with twins_without_rounding():
        engine = twin_engine(pool, model, exit_layer, 5)
    with speculating(engine) as counts:
        tokens = engine.greedy(RANDOM_PROMPTS, max_tokens=60)
    assert tokens == pool.get(model).greedy(RANDOM_PROMPTS, max_tokens=60)
    assert counts.num_accepted_tokens == counts.num_draft_tokens
    assert sum(drafted == 5 for drafted, _ in counts.drafts) >= 36
    pool.close()


# Requests that lose their blocks and slots.


def test_preempted_requests_end_as_if_alone(pool, checkpoint, prompts):
    roomy = {"block_size": BLOCK_SIZE, "enable_prefix_caching": False}
    batch = [prompts[0], prompts[3], prompts[4], prompts[5]]
    expected = pool.get(checkpoint, **roomy).greedy(batch, max_tokens=90)
    engine = twin_engine(pool, checkpoint, ALL, 4, num_gpu_blocks_override=13, **roomy)
    with speculating(engine) as counts:
        assert engine.greedy(batch, max_tokens=90) == expected
    assert counts.num_preemptions > 0


@pytest.fixture(scope="module", params=[False, True], ids=["sync", "async"])
def engine(request, pool, checkpoint):
    """One engine of all layers in 4 bits; its prefix cache is on."""
    return twin_engine(
        pool, checkpoint, ALL, 5, block_size=BLOCK_SIZE, async_scheduling=request.param
    )


@pytest.fixture(scope="module")
def plain(pool, checkpoint):
    return pool.get(checkpoint, block_size=BLOCK_SIZE)


def test_preemption_between_drafting_and_verification(engine, plain, prompts):
    """All requests lose their slots and blocks with drafts pending."""
    expected = plain.greedy(prompts[:4], max_tokens=40)
    engine.reset_prefix_cache()
    tokens: dict[str, list[int]] = {}
    with speculating(engine) as counts:
        for name, prompt in zip("abcd", prompts, strict=False):
            engine.start(name, prompt, max_tokens=40)
        step = 0
        while engine.llm.llm_engine.has_unfinished_requests():
            tokens.update(engine.step())
            step += 1
            if step % 3 == 0 and engine.scheduler.running:
                assert any(request.spec_token_ids for request in engine.scheduler.running)
                engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert [tokens[name] for name in "abcd"] == expected
    assert counts.num_preemptions > 4


def test_abort_frees_a_slot_for_a_new_request(engine, plain, prompts):
    survivor, newcomer = plain.greedy([prompts[0], prompts[4]], 50)
    engine.reset_prefix_cache()
    with speculating(engine):
        engine.start("survivor", prompts[0], max_tokens=50)
        for number in range(3):
            engine.start(f"aborted-{number}", prompts[3], max_tokens=60)
        for _ in range(5):
            engine.step()
        for number in range(3):
            engine.abort(f"aborted-{number}")
        engine.start("newcomer", prompts[4], max_tokens=50)
        tokens = engine.run_to_end()
    assert (tokens["survivor"], tokens["newcomer"]) == (survivor, newcomer)


# The prefix cache.


@pytest.mark.parametrize("model_name", ["checkpoint", "random_checkpoint"])
def test_prefix_hits_and_tokens_equal_plain_vllms(pool, request, prompts, model_name):
    model = request.getfixturevalue(model_name)
    source = prompts[2]
    exit_layer: int | str = ALL
    if model_name == "random_checkpoint":
        source, exit_layer = [token % 60 + 3 for token in source], 1
    plain = pool.get(model, block_size=BLOCK_SIZE)
    engine = twin_engine(pool, model, exit_layer, 5, block_size=BLOCK_SIZE, async_scheduling=False)
    engine.reset_prefix_cache()
    first = source[:70]
    (answer, _), *_ = cached_tokens(plain, [first], 45)
    # As in test_prefix_cache.py: a longer prompt on top of an answer whose blocks were filled
    # while a twin drafted, and prompts of whole blocks.
    longer = first + answer + source[1:20]
    sequence = [first, longer, first, longer, first[: 2 * BLOCK_SIZE], longer[: 3 * BLOCK_SIZE]]
    plain.reset_prefix_cache()
    expected = cached_tokens(plain, sequence, 45)
    with speculating(engine):
        assert cached_tokens(engine, sequence, 45) == expected
    hits = [cached for _, cached in expected]
    assert hits[1] >= 3 * BLOCK_SIZE
    assert all(cached > 0 for cached in hits[1:])


def padded_rows(batches, num_rows: int) -> int:
    """Batches with a prefill of one token that vLLM padded to look like a decode of five drafts."""
    return sum(has_prefill and tokens == [6] * num_rows for has_prefill, tokens, *_ in batches)


def test_one_token_left_after_a_hit_while_another_request_runs(engine, plain, prompts):
    prompt = prompts[2][: 2 * BLOCK_SIZE + 1]
    expected = plain.greedy([prompt, prompts[0]], max_tokens=40)
    engine.reset_prefix_cache()
    engine.greedy([prompt], max_tokens=1)  # Two full blocks of the prompt are cached now.
    with recorded_batches(engine) as batches, speculating(engine):
        engine.start("running", prompts[0], max_tokens=40)
        tokens = {}
        for _ in range(3):
            tokens.update(engine.step())
        engine.start("cached", prompt, max_tokens=40)
        tokens.update(engine.run_to_end())
    assert [tokens["cached"], tokens["running"]] == expected
    assert padded_rows(batches, 2) > 0, "no row was padded: the case under test did not happen"


def test_one_token_left_of_a_resumed_request(engine, plain, prompts):
    """Preempted between its drafts and their verification, and back with all but one token."""
    num_preempted = num_padded = 0
    # A step gives some four tokens: not every length meets the end of a block.
    for length in (33, 32, 31, 30):
        batch = {"preempted": prompts[0][:length], "running": prompts[3]}
        expected = plain.greedy(list(batch.values()), max_tokens=90)
        engine.reset_prefix_cache()
        with recorded_batches(engine) as batches, speculating(engine):
            for name, prompt in batch.items():
                engine.start(name, prompt, max_tokens=90)
            tokens = {}
            while engine.llm.llm_engine.has_unfinished_requests():
                tokens.update(engine.step())
                num_preempted += preempt_at_the_end_of_a_block(engine.scheduler)
        assert [tokens[name] for name in batch] == expected
        num_padded += padded_rows(batches, 2)
        if num_padded:
            break
    assert num_preempted > 0
    assert num_padded > 0


def preempt_at_the_end_of_a_block(scheduler) -> bool:
    """Whole blocks are in the prefix cache then, so that one token is left."""
    mine = [r for r in scheduler.running if r.request_id.startswith("preempted")]
    if not mine or mine[0].num_tokens % BLOCK_SIZE != 1 or len(scheduler.running) != 2:
        return False
    scheduler.running.remove(mine[0])
    scheduler._preempt_request(mine[0], time.monotonic(), drop_stale_output=True)
    return True


# Positions, schedules and windows.


@pytest.mark.parametrize(
    ("model_name", "num_speculative_tokens"), [("random_checkpoint", 4), ("checkpoint", 7)]
)
def test_every_residue_of_the_models_last_position(
    pool, request, prompts, model_name, num_speculative_tokens
):
    model = request.getfixturevalue(model_name)
    settings = {"max_model_len": MAX_MODEL_LEN, "block_size": BLOCK_SIZE}
    source = [token % 60 + 3 for token in prompts[2]] if model_name != "checkpoint" else prompts[2]
    batch = [
        source[: MAX_MODEL_LEN - 14 - residue] for residue in range(num_speculative_tokens + 2)
    ]
    expected = run_to_the_end(pool.get(model, **settings), batch)
    assert [len(p) + len(t) for p, (t, _) in zip(batch, expected, strict=True)] == [
        MAX_MODEL_LEN
    ] * len(batch)
    exit_layer = ALL if model_name == "checkpoint" else 1
    engine = twin_engine(pool, model, exit_layer, num_speculative_tokens, **settings)
    with speculating(engine):
        assert run_to_the_end(engine, batch) == expected
    engine.reset_prefix_cache()
    for prompt, answer in zip(batch, expected, strict=True):
        assert run_to_the_end(engine, [prompt]) == [answer]


def test_a_schedule_that_goes_to_no_drafts_and_back(pool, checkpoint, prompts):
    expected = [pool.get(checkpoint).greedy([prompt], 70)[0] for prompt in prompts[:4]]
    lengths = [70, 20, 12, 8]
    schedule = [[1, 1, 4], [2, 2, 2], [3, 4, 0]]
    engine = twin_engine(
        pool, checkpoint, ALL, 4, spec={"num_speculative_tokens_per_batch_size": schedule}
    )
    tokens: dict[str, list[int]] = {}
    drafted: list[int] = []
    with speculating(engine) as counts:
        engine.start("0", prompts[0], lengths[0])
        for step in range(400):
            before = counts.num_draft_tokens
            tokens.update(engine.step())
            drafted.append(counts.num_draft_tokens - before)
            if step == 4:
                for number in (1, 2, 3):
                    engine.start(str(number), prompts[number], lengths[number])
            if not engine.llm.llm_engine.has_unfinished_requests():
                break
    for number, length in enumerate(lengths):
        assert tokens[str(number)] == expected[number][:length]
    without = [step for step, number in enumerate(drafted) if number == 0 and step > 4]
    assert len(without) > 5
    assert sum(drafted[: without[0]]) > 0
    assert sum(drafted[without[-1] :]) > 0, "no drafts after the batch became small again"


@pytest.mark.parametrize("exit_layer", [1, pytest.param(ALL, marks=pytest.mark.slow)])
def test_windows_free_blocks_behind_a_twins_drafts(pool, tmp_path, exit_layer):
    """Layers with a sliding window and without take turns."""
    model = random_checkpoint(tmp_path / "model", "Gemma3ForCausalLM")
    settings = {
        "block_size": BLOCK_SIZE,
        "max_model_len": 192,
        "prefix_cache_retention_interval": BLOCK_SIZE,
    }
    assert WINDOW < BLOCK_SIZE
    prompts = [[0, *(3 + (7 * i) % 50 for i in range(length))] for length in (4, 37, 70, 95)]
    expected = pool.get(model, **settings).greedy(prompts, max_tokens=70)
    engine = twin_engine(pool, model, exit_layer, 4, **settings)
    for again in (False, True):
        with speculating(engine) as counts:
            assert engine.greedy(prompts, max_tokens=70) == expected
        assert counts.num_accepted_tokens < counts.num_draft_tokens, again


# Sampling parameters and distributions.


@pytest.mark.parametrize(
    ("scheduling", "async_scheduling"),
    [
        pytest.param("whole prompts", False, marks=pytest.mark.slow),
        ("chunked prefill and preemption", True),
    ],
    ids=["whole-prompts", "async-chunks-preemption"],
)
def test_every_feature_in_one_batch(pool, checkpoint, prompts, scheduling, async_scheduling):
    """Structured outputs, penalties, stops and log probabilities, with sampled drafts."""
    prompts = [prompts[index] for index in (0, 5, 3)]
    plain = ask(pool.get(checkpoint, **SETTINGS), prompts)
    engine = twin_engine(
        pool,
        checkpoint,
        ALL,
        4,
        spec={"draft_sample_method": "probabilistic"},
        async_scheduling=async_scheduling,
        **SETTINGS,
        **SCHEDULING[scheduling],
    )
    answers = ask(engine, prompts)
    counts = answers.counts
    counts.assert_speculated()
    assert counts.num_verify_steps_reused == 0
    assert (counts.num_preemptions > 0) == ("preemption" in scheduling)
    for feature in FEATURES:
        drafts = counts.of_request(feature)
        assert sum(drafted for drafted, _ in drafts) > 0, feature
        if feature not in SAMPLED:
            assert answers.tokens(feature) == plain.tokens(feature), feature
            assert answers.requests[feature].outputs[0].text == (
                plain.requests[feature].outputs[0].text
            )


@pytest.mark.parametrize(
    "method", [pytest.param("greedy", marks=pytest.mark.slow), "probabilistic"]
)
def test_the_distribution_is_the_targets(pool, tmp_path, method):
    model = random_llama(tmp_path / "model", vocab_size=6, logit_gain=0.35, seed=3)
    temperature = 0.9
    engine = twin_engine(
        pool,
        model,
        ALL,
        3,
        spec={"draft_sample_method": method},
        max_num_seqs=100,
        max_num_batched_tokens=1024,
        block_size=BLOCK_SIZE,
    )
    with speculating(engine) as counts:
        samples = sample(engine, temperature, 400)
    assert 0.1 < counts.num_accepted_tokens / counts.num_draft_tokens < 0.99
    assert_drawn_from(samples, exact_distribution(model, temperature))
    with pytest.raises(AssertionError):
        # Negative control: the same model at another temperature is told apart.
        assert_drawn_from(samples, exact_distribution(model, 0.5))


# Families.


@pytest.fixture
def few_engines():
    pool = EnginePool()
    yield pool
    pool.close()


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in FAMILIES],
)
def test_every_family_drafts_with_all_its_layers_in_four_bits(few_engines, tmp_path, architecture):
    model = random_checkpoint(tmp_path / "model", architecture)
    expected = few_engines.get(model).greedy(RANDOM_PROMPTS, max_tokens=20)
    engine = twin_engine(few_engines, model, ALL, 3)
    with speculating(engine) as counts:
        assert engine.greedy(RANDOM_PROMPTS, max_tokens=20) == expected
    twin = engine.runner.model.draft_twin
    assert (twin.num_full_width, twin.head is None) == (0, False)
    assert len(twin.linears) == 4 * 4, "four linear layers in each of four decoder layers"
    assert counts.num_accepted_tokens > 0.3 * counts.num_draft_tokens


# K/V.


def blocks_of(engine) -> dict[str, list[int]]:
    """The K/V blocks of each running request, by the name that the test gave it."""
    manager = engine.scheduler.kv_cache_manager
    return {
        request.request_id.rsplit("-", 1)[0]: manager.get_block_ids(request.request_id)[0]
        for request in engine.scheduler.running
    }


def kv_of(engine, blocks) -> torch.Tensor:
    """``[L, len(blocks), ...]``: a copy of all layers' K/V in these blocks."""
    num_blocks = engine.vllm_config.cache_config.num_gpu_blocks
    caches = engine.runner.kv_caches
    dim = list(caches[0].shape).index(num_blocks)
    return torch.stack([cache.movedim(dim, 0)[blocks].clone() for cache in caches])


def run_until(engine, prompts, num_tokens, after_step=lambda: None):
    """(tokens, K/V of whole committed blocks) of each request, none of them at its end."""
    for name, prompt in prompts.items():
        engine.start(name, prompt, max_tokens=400)
    tokens = dict.fromkeys(prompts, [])
    while min(map(len, tokens.values())) < num_tokens:
        tokens.update(engine.step())
        after_step()
    found = {}
    for name, blocks in blocks_of(engine).items():
        num_whole = (len(prompts[name]) + num_tokens - 1) // BLOCK_SIZE
        found[name] = kv_of(engine, blocks[:num_whole])
    for name in prompts:
        engine.abort(name)
    return {name: tokens[name][:num_tokens] for name in prompts}, found


def unverified_blocks(engine, seen):
    """Adds to ``seen`` the K/V of blocks whose last position has only a twin's K/V.

    That position's token is the one that was sampled last, so it is certain; the positions before
    it are verified. Each is kept under its request and the block's number in the request.
    """
    for request in engine.scheduler.running:
        name = request.request_id.rsplit("-", 1)[0]
        if request.num_output_tokens and request.num_tokens % BLOCK_SIZE == 0:
            number = request.num_tokens // BLOCK_SIZE - 1
            seen[name, number] = kv_of(engine, [blocks_of(engine)[name][number]])[:, 0]


ROUNDING = 1e-4
"""Of float32: rows of a verify step and of a decode are sums in another order."""


@pytest.mark.parametrize("exit_layer", [2, ALL])
def test_verification_overwrites_a_twins_kv_in_every_layer(pool, random_checkpoint, exit_layer):
    settings = {"max_model_len": 512, "block_size": BLOCK_SIZE, "enable_prefix_caching": False}
    prompts = {str(length): [0, *range(3, 2 + length)] for length in (5, 20, 39, 50)}
    expected_tokens, expected = run_until(pool.get(random_checkpoint, **settings), prompts, 210)
    engine = twin_engine(pool, random_checkpoint, exit_layer, 4, **settings)
    unverified: dict[tuple[str, int], torch.Tensor] = {}
    with speculating(engine) as counts:
        tokens, verified = run_until(
            engine, prompts, 210, lambda: unverified_blocks(engine, unverified)
        )
    assert tokens == expected_tokens
    assert counts.num_drafts > 200
    assert counts.num_draft_tokens - counts.num_accepted_tokens > 100
    for name, kv in verified.items():
        assert kv.shape[:2] == (4, (len(prompts[name]) + 209) // BLOCK_SIZE)
        torch.testing.assert_close(kv, expected[name], rtol=ROUNDING, atol=ROUNDING)
    # The control: before verification, the K/V of the layers that draft were not the target's.
    unverified = {
        (name, number): kv
        for (name, number), kv in unverified.items()
        if number < verified[name].shape[1]
    }
    assert len(unverified) >= 3
    for (name, number), kv in unverified.items():
        errors = (kv - expected[name][:, number]).flatten(1).abs().amax(1)
        assert (errors[:2] > 100 * ROUNDING).all(), errors
