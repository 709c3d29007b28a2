# SPDX-License-Identifier: Apache-2.0
"""Tests that only a GPU can answer, with the engine tests' helpers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

from checkpoints import EMBEDDED  # noqa: E402
from engines import EnginePool  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.timeout(900))
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.fixture(scope="module")
def pool() -> Iterator[EnginePool]:
    pool = EnginePool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    return EMBEDDED


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Six prompts of 5 to 140 tokens of the standard library, unseen by the checkpoint."""
    from transformers import AutoTokenizer

    from vllm_layerskip.training.corpus import held_out_prompts, load_stdlib

    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    texts = [text for _, text in held_out_prompts(load_stdlib(), 6)]
    lengths = (33, 5, 140, 64, 17, 90)
    encoded = [[tokenizer.bos_token_id, *ids] for ids in tokenizer(texts)["input_ids"]]
    return [ids[:length] for ids, length in zip(encoded, lengths, strict=True)]
