# SPDX-License-Identifier: Apache-2.0
"""Catch acceptance that is not the walk's, statistics of the wrong exit or token, and text behind
an end of sequence that counts."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_layerskip.errors import UserError
from vllm_layerskip.evaluation.agreement import Agreement
from vllm_layerskip.evaluation.predictions import generate_greedily, measure_agreement
from vllm_layerskip.evaluation.scores import accepted_runs, greedy_draft_matches

NUM_LAYERS = 4


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3,
        bos_token_id=0, eos_token_id=None, pad_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, 48, (n,), generator=generator).tolist() for n in (5, 11, 3, 8, 8)]


@given(
    st.lists(st.lists(st.booleans(), max_size=20), min_size=1, max_size=4),
    st.integers(1, 9),
)
def test_acceptance_lengths_are_those_of_the_step_by_step_walk(rows, max_k):
    matches = tuple(np.array([row, [not m for m in row]], dtype=bool) for row in rows)
    lengths = Agreement((2, 5), matches, 1.0).acceptance_lengths(max_k)
    assert lengths.shape == (2, max_k)
    for exit_index in range(2):
        for num_drafts in range(1, max_k + 1):
            runs = [
                run
                for row in matches
                for run in accepted_runs(row[exit_index].tolist(), num_drafts)
            ]
            expected = 1 + sum(runs) / len(runs) if runs else np.nan
            assert lengths[exit_index, num_drafts - 1] == pytest.approx(expected, nan_ok=True)


@pytest.mark.usefixtures("one_thread")
class TestOnAModel:
    def test_prompts_of_one_length_match_as_evaluate_says(self, model, prompts):
        same = [ids[-3:] for ids in prompts]
        expected = greedy_draft_matches(model, torch.tensor(same), 12)
        answers = generate_greedily(model, same, 12, (), batch_size=2)
        agreement = measure_agreement(model, same, answers, (1, 2, 3), max_batch_tokens=40)
        assert agreement.target_agreement == 1.0
        assert agreement.num_tokens == len(same) * 11
        for row, matches in enumerate(agreement.matches):
            np.testing.assert_array_equal(matches, expected[:, row, 1:].numpy())
        assert 0 < agreement.rate(3) < 1
        assert agreement.rate(1) == pytest.approx(float(expected[0, :, 1:].float().mean()))

    def test_prompts_of_any_length_get_what_they_get_alone(self, model, prompts):
        together = generate_greedily(model, prompts, 16, (), batch_size=3)
        agreement = measure_agreement(model, prompts, together, (2, 3))
        for prompt, answer, matches in zip(prompts, together, agreement.matches, strict=True):
            (alone,) = generate_greedily(model, [prompt], 16, ())
            assert answer == alone
            expected = greedy_draft_matches(model, torch.tensor([prompt]), 16)
            np.testing.assert_array_equal(matches, expected[1:, 0, 1:].numpy())

    def test_an_answer_ends_with_its_stop_token(self, model, prompts):
        whole = generate_greedily(model, prompts, 16, ())
        stop = whole[0][6]
        answers = generate_greedily(model, prompts, 16, (stop,))
        model.generation_config.eos_token_id = stop  # Only what is asked for ends an answer.
        try:
            assert generate_greedily(model, prompts, 16, ()) == whole
        finally:
            model.generation_config.eos_token_id = None
        for answer, without in zip(answers, whole, strict=True):
            end = without.index(stop) + 1 if stop in without else len(without)
            assert answer == without[:end]
        agreement = measure_agreement(model, prompts, answers, (1, 2, 3))
        compared = [len(answer) - 1 for answer in answers if len(answer) > 1]
        assert [rows.shape[1] for rows in agreement.matches] == compared
        assert agreement.target_agreement == 1.0

    def test_a_draft_vocabulary_binds_exits_and_not_the_target(self, model, prompts):
        answers = generate_greedily(model, prompts, 16, ())
        every = measure_agreement(model, prompts, answers, (3,), range(48))
        none = measure_agreement(model, prompts, answers, (3,))
        np.testing.assert_array_equal(every.matches[0], none.matches[0])
        # Only a token that is in it can match; and it matches at least where it did without.
        vocab = sorted(set(answers[0]))[::2]
        some = measure_agreement(model, prompts, answers, (3,), vocab)
        assert some.target_agreement == 1.0
        for answer, bound, free in zip(answers, some.matches, none.matches, strict=True):
            listed = np.isin(answer[1:], vocab)
            assert not bound[0][~listed].any()
            assert bound[0][listed & free[0]].all()

    def test_a_small_head_chunk_changes_nothing(self, model, prompts, monkeypatch):
        answers = generate_greedily(model, prompts, 16, ())
        expected = measure_agreement(model, prompts, answers, (1, 3))
        monkeypatch.setattr("vllm_layerskip.evaluation.predictions.HEAD_CHUNK_TOKENS", 5)
        agreement = measure_agreement(model, prompts, answers, (1, 3))
        for ours, theirs in zip(agreement.matches, expected.matches, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_file_is_read_back(tmp_path):
    matches = (np.array([[True, False]]), np.zeros((1, 0), dtype=bool), np.array([[True]]))
    path = tmp_path / "agreement.npz"
    Agreement((3,), matches, 0.5).save(path, "digest")
    agreement, identity = Agreement.load(path)
    assert (agreement.exit_layers, agreement.target_agreement, identity) == ((3,), 0.5, "digest")
    for ours, theirs in zip(agreement.matches, matches, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert [p.name for p in tmp_path.iterdir()] == ["agreement.npz"]


@pytest.mark.parametrize("content", [None, b"", b"text", b"PK\x03\x04cut off"])
def test_another_file_is_refused(tmp_path, content):
    path = tmp_path / "agreement.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="--agreement .*no file of agreement statistics"):
        Agreement.load(path)
