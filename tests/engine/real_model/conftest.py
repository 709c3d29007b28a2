# SPDX-License-Identifier: Apache-2.0
"""Engines of a real model: 30 layers, a vocabulary of 49152, a chat template.

A process has one thread for it (Makefile), and a token costs a quarter of a GFLOP: few tokens,
and engines that tests share.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from example_folder import find_example

from vllm_layerskip.chats.chat import chat_token_ids


@pytest.fixture(scope="session")
def example() -> Path:
    return find_example()


@pytest.fixture(scope="session")
def tokenizer(example):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(example)


@pytest.fixture(scope="session")
def ask(tokenizer):
    """Token ids of a chat with one question, as `vllm serve` makes them."""

    def token_ids(question: str) -> list[int]:
        return chat_token_ids(tokenizer, [{"role": "user", "content": question}])

    return token_ids
