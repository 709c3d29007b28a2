# SPDX-License-Identifier: Apache-2.0
"""With temperature, the output distribution is the target's (docs/tests.md, T15).

A vocabulary of 6 tokens lets the exact distribution of whole continuations be enumerated
with transformers; thousands of continuations from the engine are tested against it.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from checkpoints import load_reference, random_llama
from scipy.stats import chisquare
from vllm import SamplingParams
from vllm.inputs import TokensPrompt

VOCAB_SIZE = 6
PROMPT = [0, 3, 5, 2, 4]
NUM_TOKENS = 4
NUM_SAMPLES = 400
SMALLEST_P = 1e-4
"""Every request is seeded, so a run can be repeated: no false alarm comes by chance."""


@pytest.fixture(scope="module")
def sampling_model(tmp_path_factory):
    return random_llama(
        tmp_path_factory.mktemp("sampling") / "model",
        vocab_size=VOCAB_SIZE,
        logit_gain=0.35,
        seed=3,
    )


def exact_distribution(model, temperature: float) -> np.ndarray:
    """``[V] * NUM_TOKENS`` probabilities of every continuation."""
    reference = load_reference(model)
    continuations = list(itertools.product(range(VOCAB_SIZE), repeat=NUM_TOKENS))
    with torch.inference_mode():
        logits = reference(torch.tensor([PROMPT + list(c) for c in continuations])).logits
    logprobs = (logits[:, len(PROMPT) - 1 : -1] / temperature).log_softmax(-1)
    chosen = torch.tensor(continuations)[..., None]
    total = logprobs.gather(-1, chosen).sum((1, 2)).double().exp()
    return total.numpy().reshape((VOCAB_SIZE,) * NUM_TOKENS)


def sample(engine, temperature: float, num_samples: int) -> np.ndarray:
    """``[num_samples, NUM_TOKENS]`` tokens; every continuation is its own seeded request."""
    params = [
        SamplingParams(temperature=temperature, max_tokens=NUM_TOKENS, ignore_eos=True, seed=seed)
        for seed in range(num_samples)
    ]
    prompts = [TokensPrompt(prompt_token_ids=PROMPT)] * num_samples
    outputs = engine.llm.generate(prompts, params, use_tqdm=False)
    return np.array([output.outputs[0].token_ids for output in outputs])


def assert_drawn_from(samples: np.ndarray, distribution: np.ndarray) -> None:
    for axes in ((0, 1), (1, 2), (2, 3)):
        others = tuple(axis for axis in range(NUM_TOKENS) if axis not in axes)
        expected = distribution.sum(axis=others).flatten() * len(samples)
        codes = samples[:, axes[0]] * VOCAB_SIZE + samples[:, axes[1]]
        observed = np.bincount(codes, minlength=VOCAB_SIZE**2)
        rare = expected < 5  # Chi-square needs five expected counts a cell: pool the rest.
        observed = np.append(observed[~rare], observed[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
        expected *= observed.sum() / expected.sum()  # Enumerated in float32.
        if expected[-1] == 0:
            observed, expected = observed[:-1], expected[:-1]
        assert chisquare(observed, expected).pvalue > SMALLEST_P, f"tokens {axes}"


SPECS = {
    "greedy": {"draft_sample_method": "greedy"},
    "probabilistic": {"draft_sample_method": "probabilistic"},
    "draft-vocab": {"draft_sample_method": "probabilistic", "draft_vocab": "FILE"},
    "block": {"draft_sample_method": "probabilistic", "rejection_sample_method": "block"},
}


def check_distribution(pool, model, spec, num_samples):
    temperature = 0.9
    engine = pool.layerskip(
        model, 2, 3, spec=spec, max_num_seqs=100, max_num_batched_tokens=1024, block_size=32
    )
    with engine.counting() as counts:
        samples = sample(engine, temperature, num_samples)
    counts.assert_speculated()
    # Some drafts must fail too, or the residual distribution was never drawn from.
    assert 0.1 < counts.num_accepted_tokens / counts.num_draft_tokens < 0.95
    assert counts.num_verify_steps_reused > 0
    assert_drawn_from(samples, exact_distribution(model, temperature))
    with pytest.raises(AssertionError):
        # Negative control: the same model at another temperature is told apart.
        assert_drawn_from(samples, exact_distribution(model, 0.5))


@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
def test_distribution_is_the_targets(pool, sampling_model, method):
    check_distribution(pool, sampling_model, SPECS[method], NUM_SAMPLES)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("method", SPECS)
def test_distribution_is_the_targets_with_many_samples(pool, sampling_model, tmp_path, method):
    spec = dict(SPECS[method])
    if "draft_vocab" in spec:  # By default: unit/worker/test_draft_vocab_sampling.py.
        (tmp_path / "ids").write_text("1\n3\n4\n")
        spec["draft_vocab"] = str(tmp_path / "ids")
    check_distribution(pool, sampling_model, spec, 10 * NUM_SAMPLES)


def test_same_seeds_give_same_tokens(pool, checkpoint, prompts):
    engine = pool.layerskip(checkpoint, 3, 4, spec={"draft_sample_method": "probabilistic"})
    params = SamplingParams(temperature=0.8, max_tokens=30, ignore_eos=True, seed=7)
    with engine.counting() as counts:
        first = engine.generate(prompts[:3], params)
        second = engine.generate(prompts[:3], params)
    assert first == second
    assert first != engine.greedy(prompts[:3], max_tokens=30)
    counts.assert_speculated()
