# SPDX-License-Identifier: Apache-2.0
"""Engine tests run Model Runner V2 on the CPU, its Triton kernels in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import EMBEDDED, random_llama
from engines import EnginePool
from vllm.tokenizers.registry import cached_get_tokenizer

from vllm_layerskip.files.corpus import held_out_prompts, load_stdlib


@pytest.fixture(scope="module")
def pool() -> Iterator[EnginePool]:
    pool = EnginePool()
    yield pool
    pool.close()
    # An engine with prompt embeddings adds a token to the tokenizer that later engines would get.
    cached_get_tokenizer.cache_clear()


@pytest.fixture(scope="module")
def many_small_engines() -> Iterator[None]:
    """Drops what vLLM does for each engine where it costs more than a tiny model's tokens."""
    import torch._dynamo
    from vllm.model_executor.models import registry

    # Command R compiles its norm by itself. (pytest's patch would delete the option at its end.)
    with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(disable=True):
        # vLLM starts a process for each class that it has not seen.
        patch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())
        yield


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """The embedded LayerSkip checkpoint: 12 layers, really trained."""
    return EMBEDDED


@pytest.fixture(scope="session")
def tokenizer(checkpoint: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="session")
def prompts(tokenizer) -> list[list[int]]:
    """Six prompts from held-out modules, of 5 to 140 tokens."""
    texts = [text for _, text in held_out_prompts(load_stdlib(), 6)]
    lengths = (33, 5, 140, 64, 17, 90)
    encoded = [[tokenizer.bos_token_id, *ids] for ids in tokenizer(texts)["input_ids"]]
    return [ids[:length] for ids, length in zip(encoded, lengths, strict=True)]


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights: drafts are wrong most of the time, so rejection is the rule."""
    return random_llama(tmp_path_factory.mktemp("random") / "model")
