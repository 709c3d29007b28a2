# SPDX-License-Identifier: Apache-2.0
"""Draft twins with the other features: draft vocabularies, new weights, embeddings, two ranks.

Catches a twin that outlives the weights that it was made from, a draft head that is rounded from
other rows than it picks, and a rank that rounds another rank's shard.
"""

from __future__ import annotations

import json

import pytest
import torch
from checkpoints import random_llama
from engines import ENGINE_DEFAULTS, EnginePool
from families import random_checkpoint
from processes import run_script
from test_draft_adapter import add_translator, save_adapter
from test_draft_vocab import drafted
from test_prompt_embeds import EMBEDS, greedy
from test_reload import discard
from test_weight_changes import CHANGES, MIN_TOKENS, answers, noisy_checkpoint, prepare  # noqa: F401
from test_weight_changes import SETTINGS as WITHOUT_PREFIX_CACHE
from transformers import AutoConfig
from twin_worker import EXTENSION
from twins import linears_of, outputs, rounding_error, speculating, spoil, twin_engine, twin_of
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.inputs import EmbedsPrompt, TokensPrompt

from vllm_layerskip.twins.kinds import KINDS
from vllm_layerskip.twins.rounding import round_trip
from vllm_layerskip.worker.draft_twin import DraftTwin
from vllm_layerskip.worker.twin_linear import TwinLinear
from vllm_layerskip.worker.twin_methods import kinds_that_work

ALL = "all"
VOCAB_SIZE = 1024
RANDOM_PROMPTS = [[0, *range(3, 3 + length)] for length in (4, 21, 40)]

pytestmark = pytest.mark.usefixtures("many_small_engines")


# The twin's head, and draft vocabularies.


def test_the_whole_vocabularys_head_is_rounded_too(pool, checkpoint):
    engine = twin_engine(pool, checkpoint, ALL, 4)
    twin, model = twin_of(engine), engine.runner.model
    assert twin.head.target is model.lm_head
    assert twin.exit_model.lm_head is twin.head.module is not model.lm_head
    assert rounding_error(twin.head, "int4") < 1e-6
    assert twin.num_head_bytes == model.lm_head.weight.nbytes
    for linear in twin.linears:
        assert rounding_error(linear, "int4") < 1e-6


def test_the_target_has_no_more_parameters_than_without_a_twin(pool, checkpoint):
    plain, model = pool.get(checkpoint).runner.model, twin_engine(pool, checkpoint, ALL, 4)
    model = model.runner.model
    names = dict(plain.named_parameters()).keys()
    assert dict(model.named_parameters()).keys() == names
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert dict(model.named_modules()).keys() == dict(plain.named_modules()).keys()


@pytest.fixture
def odd_ids(tmp_path):
    path = tmp_path / "ids"
    path.write_text(json.dumps(list(range(1, VOCAB_SIZE, 2))))
    return str(path)


@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
def test_a_draft_vocabulary_picks_rows_and_rounds_them(pool, checkpoint, prompts, odd_ids, method):
    spec = {"draft_vocab": odd_ids, "draft_sample_method": method}
    engine = twin_engine(pool, checkpoint, ALL, 4, spec=spec)
    with speculating(engine), drafted(engine) as drafts:
        tokens = engine.greedy(prompts[:3], max_tokens=24)
    assert tokens == pool.get(checkpoint).greedy(prompts[:3], max_tokens=24)
    assert set(drafts) <= set(range(1, VOCAB_SIZE, 2))
    assert len(set(drafts)) > 5
    head = engine.runner.speculator.draft_head
    rows = engine.runner.model.lm_head.weight[head.token_ids]
    made = outputs(head._twin).t()[: len(rows)]
    torch.testing.assert_close(made, round_trip(rows, "int4"), rtol=1e-5, atol=1e-6)
    assert not torch.equal(made, rows)
    assert head.lm_head.weight.numel() == 0, "the full-width rows are kept"
    assert twin_of(engine).head is None, "a head of the whole vocabulary is kept"


def test_a_draft_vocabulary_of_all_tokens_drafts_what_none_drafts(
    pool, checkpoint, prompts, tmp_path
):
    (tmp_path / "all").write_text(json.dumps(list(range(VOCAB_SIZE))))
    runs = []
    for draft_vocab in ("none", str(tmp_path / "all")):
        engine = twin_engine(pool, checkpoint, ALL, 4, spec={"draft_vocab": draft_vocab})
        engine.reset_prefix_cache()
        with speculating(engine) as counts, drafted(engine) as drafts:
            tokens = engine.greedy(prompts[:2], max_tokens=24)
        runs.append((tokens, drafts, counts.drafts))
    assert runs[0] == runs[1]


def test_local_argmax_reduction_drafts_the_same(pool, checkpoint, prompts):
    runs = []
    for reduction in (False, True):
        spec = {"use_local_argmax_reduction": reduction}
        engine = twin_engine(pool, checkpoint, ALL, 4, spec=spec)
        engine.reset_prefix_cache()
        with speculating(engine), drafted(engine) as drafts:
            runs.append((engine.greedy(prompts[:2], max_tokens=24), drafts))
    assert runs[0] == runs[1]


# Weights that change.


def reload_weights(engine, **arguments):
    engine.llm.collective_rpc("reload_weights", kwargs=arguments)
    engine.reset_prefix_cache()


def speculate(engine, prompts):
    with speculating(engine) as counts:
        tokens = engine.greedy(prompts, 32)
    return tokens, counts.drafts


def test_reloading_other_weights_makes_the_twin_again(pool, tmp_path):
    first, second = (random_llama(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    expected = [pool.get(model).greedy(RANDOM_PROMPTS, 32) for model in (first, second)]
    assert expected[0] != expected[1]
    engine, fresh = twin_engine(pool, first, ALL, 3), twin_engine(pool, second, ALL, 3)
    assert speculate(engine, RANDOM_PROMPTS)[0] == expected[0]
    modules = [linear.module for linear in linears_of(engine)]
    reload_weights(engine, weights_path=str(second))
    assert [linear.module for linear in linears_of(engine)] == modules
    for linear, other in zip(linears_of(engine), linears_of(fresh), strict=True):
        assert torch.equal(outputs(linear), outputs(other))
    tokens, drafts = speculate(engine, RANDOM_PROMPTS)
    assert tokens == expected[1]
    assert (tokens, drafts) == speculate(fresh, RANDOM_PROMPTS)


@pytest.mark.parametrize("draft_vocab", [False, True], ids=["whole-vocab", "draft-vocab"])
def test_discarded_memory_is_made_anew(pool, checkpoint, prompts, odd_ids, draft_vocab):
    """Sleep level 2 discards weights, the twin's too, and a reload brings the target's."""
    spec = {"draft_vocab": odd_ids} if draft_vocab else {}
    engine = twin_engine(pool, checkpoint, ALL, 4, spec=spec)
    engine.reset_prefix_cache()
    before = speculate(engine, prompts[:3])
    engine.reset_prefix_cache()
    discard(engine.runner)
    spoil(engine)
    reload_weights(engine)
    assert speculate(engine, prompts[:3]) == before


def test_an_adapters_norm_and_translator_are_made_anew(pool, checkpoint, prompts, tmp_path):
    adapter = save_adapter(tmp_path / "a", checkpoint, ["v_proj"], norm=True)
    size = AutoConfig.from_pretrained(checkpoint).hidden_size
    adapter = add_translator(adapter, tmp_path / "t", torch.eye(size) * 1.5)
    engine = pool.layerskip(checkpoint, 3, 4, spec={"draft_adapter": str(adapter)})
    before = speculate(engine, prompts[:3])
    engine.reset_prefix_cache()
    discard(engine.runner)
    spoil(engine)
    norm = engine.runner.model.draft_twin.exit_model.model.norm
    norm.translator.data.fill_(7.5)
    norm.norm.weight.data.fill_(7.5)
    reload_weights(engine)
    assert speculate(engine, prompts[:3]) == before
    assert torch.equal(norm.translator, torch.eye(size) * 1.5)


@pytest.fixture(scope="module")
def engines(pool, checkpoint, noisy_checkpoint):  # noqa: F811
    engines = {
        "plain": pool.get(checkpoint, **WITHOUT_PREFIX_CACHE),
        "twin": twin_engine(pool, checkpoint, ALL, 4, **WITHOUT_PREFIX_CACHE),
    }
    for engine in engines.values():
        prepare(engine, noisy_checkpoint)
    return engines


@pytest.mark.parametrize(
    "name",
    [
        "reload",
        "apply_model",
        "sleep level 2",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in CHANGES
            if name not in ("reload", "apply_model", "sleep level 2")
        ),
    ],
)
def test_weights_that_change_in_flight(engines, prompts, name):
    """Plain vLLM makes the same change after the same number of tokens."""
    prompts, change = [prompts[number] for number in (0, 2)], CHANGES[name]
    counts, tokens = answers(engines["twin"], prompts, change, [MIN_TOKENS] * 2)
    assert answers(engines["plain"], prompts, change, counts)[1] == tokens
    # Written in place are norms, which the twin shares, and the embedding, which is its head.
    for linear in linears_of(engines["twin"]):
        assert rounding_error(linear, "int4") < 1e-5


def test_a_missed_change_would_leave_an_old_twin(engines, prompts, monkeypatch):
    """The control."""
    engine = engines["twin"]
    reload_weights(engine)
    engine.greedy(prompts[:1], 8)
    assert rounding_error(twin_of(engine).head, "int4") < 1e-5
    monkeypatch.setattr(DraftTwin, "refresh", lambda self: None)
    CHANGES["apply_model"](engine)
    engine.greedy(prompts[:1], 8)
    assert rounding_error(twin_of(engine).head, "int4") > 0.1


# vLLM's kernels.


@pytest.mark.parametrize("kind", KINDS)
def test_vllms_own_kernels_draft_for_a_model_with_biases(tmp_path, kind):
    """In bfloat16; near ties need not be plain decoding's there."""
    with set_current_vllm_config(VllmConfig()):
        if kind not in kinds_that_work(torch.bfloat16):
            pytest.skip(f"vLLM has no kernel for {kind} on this machine")
    pool = EnginePool()
    model = random_checkpoint(tmp_path / "model", "Qwen2ForCausalLM")
    engine = twin_engine(pool, model, ALL, 3, kind, dtype="bfloat16", max_model_len=128)
    twin = twin_of(engine)
    assert twin.kernel_names != ["full width"]
    assert twin.num_full_width == 0
    before = None
    for _ in range(2):
        with speculating(engine) as counts:
            tokens = engine.greedy(RANDOM_PROMPTS, 24)
        assert [len(answer) for answer in tokens] == [24] * 3
        assert counts.num_accepted_tokens > 0.5 * counts.num_draft_tokens
        assert before in (None, (tokens, counts.drafts))
        before = tokens, counts.drafts
        # The twin is made again, outside of vLLM's start.
        for linear in linears_of(engine):
            linear.method.make_weights(
                linear.module,
                torch.zeros(linear.shape, dtype=torch.bfloat16, device=engine.runner.device),
                linear.module._parameters["bias"],
            )
        reload_weights(engine)
    pool.close()


# Embeddings.


def test_prompts_of_embeddings_and_of_token_ids_in_one_batch(pool, checkpoint, prompts):
    engine = twin_engine(pool, checkpoint, ALL, 4, **EMBEDS)
    embed = engine.runner.model.model.embed_tokens.weight.detach()
    generator = torch.Generator().manual_seed(0)
    inputs: list[EmbedsPrompt | TokensPrompt] = []
    for number, prompt in enumerate(prompts):
        embeds = embed[torch.tensor(prompt)].cpu()
        embeds = embeds + embeds.std() * torch.randn(embeds.shape, generator=generator)
        inputs.append(
            EmbedsPrompt(prompt_embeds=embeds)
            if number % 2
            else TokensPrompt(prompt_token_ids=prompt)
        )
    expected = greedy(pool.get(checkpoint, **EMBEDS), inputs)
    for _ in range(2):  # Again, from the prefix cache.
        with speculating(engine):
            assert greedy(engine, inputs) == expected


# Two ranks.


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        ("int8", {}),
        pytest.param("int4", {"draft_vocab": "FILE"}, marks=pytest.mark.slow),
        pytest.param("fp8", {"use_local_argmax_reduction": True}, marks=pytest.mark.slow),
    ],
    ids=["int8", "int4-draft-vocab", "fp8-local-argmax"],
)
def test_each_of_two_ranks_rounds_its_shard(pool, checkpoint, prompts, odd_ids, kind, spec):
    spec = {name: odd_ids if value == "FILE" else value for name, value in spec.items()}
    request = {
        "engine": {
            **ENGINE_DEFAULTS,
            "model": str(checkpoint),
            "tensor_parallel_size": 2,
            "distributed_executor_backend": "mp",
            "worker_extension_cls": EXTENSION,
            "speculative_config": {
                "method": "layerskip",
                "exit_layer": ALL,
                "num_speculative_tokens": 4,
                "draft_quantization": kind,
                **spec,
            },
        },
        "prompts": prompts[:4],
        "max_tokens": 24,
    }
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    (result,), _ = run_script(
        "generate_in_process.py", json.dumps(request), environment=environment
    )
    assert result["tokens"] == pool.get(checkpoint).greedy(prompts[:4], max_tokens=24)
    drafted_tokens = result["metrics"]["vllm:spec_decode_num_draft_tokens"]
    accepted = result["metrics"]["vllm:spec_decode_num_accepted_tokens"]
    assert 0.5 * drafted_tokens < accepted <= drafted_tokens or "draft_vocab" in spec
    assert accepted > 0
    first, second = result["stats"]
    whole = twin_of(twin_engine(pool, checkpoint, ALL, 4))
    for index, linear in enumerate(whole.linears):
        shapes = first["shapes"][index], second["shapes"][index]
        assert shapes[0] == shapes[1]
        assert shapes[0][0] * shapes[0][1] * 2 == linear.shape[0] * linear.shape[1]
        assert first["sums"][index] != second["sums"][index], "both ranks have the same shard"
    for rank in (first, second):
        assert max(rank["errors"]) < 1e-6
        assert rank["num_exit_state_bytes"] == rank["num_verify_steps_reused"] == 0
        assert rank["num_verify_steps_full"] == first["num_verify_steps_full"] > 0


def test_a_start_makes_each_weight_once(pool, checkpoint, prompts, monkeypatch):
    """vLLM's own calls of a start change no weights; a twin that is made again costs seconds."""
    made, make = [], TwinLinear.make
    monkeypatch.setattr(TwinLinear, "make", lambda self: (made.append(self.target), make(self)))
    engine = twin_engine(pool, checkpoint, "all", 3, max_num_seqs=3)
    tokens = engine.greedy(prompts[:2], 20)
    assert len(made) == 12 * 4 + 1
    assert len(set(map(id, made))) == len(made)
    with engine.counting() as counts:
        assert engine.greedy(prompts[:2], 20) == tokens
    assert tokens == pool.get(checkpoint).greedy(prompts[:2], 20)
    counts.assert_speculated()
