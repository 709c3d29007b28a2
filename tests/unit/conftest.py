# SPDX-License-Identifier: Apache-2.0
"""A checkpoint folder without weights, and engine configs built from it."""

import logging

import pytest
from hypothesis import settings

NUM_LAYERS = 4

# A busy machine is no bug: no time limit on a single example.
settings.register_profile("unit", deadline=None)
settings.load_profile("unit")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Folder of a 4-layer Llama: a config.json is all that an engine config needs."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("llama")
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        num_hidden_layers=NUM_LAYERS,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=128,
        max_position_embeddings=64,
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def engine_args(checkpoint):
    """``make(speculative_config, **settings)``: EngineArgs on the checkpoint, plugin loaded."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_layerskip.plugin import register

    register()

    def make(speculative_config=None, **settings):
        defaults = {
            "model": checkpoint,
            "tokenizer": checkpoint,
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "max_model_len": 64,
        }
        return EngineArgs(**defaults | settings, speculative_config=speculative_config)

    return make


@pytest.fixture
def engine_config(engine_args):
    """``make(speculative_config, **settings)``: the VllmConfig of such an engine."""

    def make(speculative_config=None, **settings):
        return engine_args(speculative_config, **settings).create_engine_config()

    return make


@pytest.fixture
def layerskip_log(caplog, monkeypatch):
    """Records of our loggers; vLLM, once it is imported, keeps its own from pytest's handler."""
    logger = logging.getLogger("vllm.layerskip")
    monkeypatch.setattr(logger, "propagate", False)
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture(scope="module")
def one_thread():
    """Tiny models spend more time on sharing work between threads than on the work."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Encoded samples go to a folder of the tests."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    datasets.disable_progress_bars()
    yield datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = before
