# SPDX-License-Identifier: Apache-2.0
"""A tiny checkpoint, texts, and configs that train on them."""

import pytest

from unit.training.training_runs import config, write_checkpoint, write_texts


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts") / "texts.jsonl")


@pytest.fixture
def make(tmp_path, base, texts):
    """``make(**sections)``: a config that writes below ``tmp_path``."""
    return lambda **sections: config(tmp_path, base, texts, **sections)
