# SPDX-License-Identifier: Apache-2.0
"""Catch a checkpoint whose code runs, and a server that listens where plain vLLM does not."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
from checkpoints import with_config

SPEC = {"method": "layerskip", "exit_layer": 3, "num_speculative_tokens": 5}


class RunsOnUnpickling:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


def with_code(checkpoint: Path, folder: Path, marker: Path) -> Path:
    """A copy whose config.json and tokenizer_config.json name classes of a file beside them."""
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    auto_map = {name: f"code_of_checkpoint.{name}Remote" for name in names}
    model = with_config(checkpoint, folder, auto_map=auto_map)
    tokenizer_config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").unlink()
    tokenizer_config["auto_map"] = {"AutoTokenizer": [None, auto_map["AutoTokenizer"]]}
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (model / "code_of_checkpoint.py").write_text(
        f"import os\nos.mkdir({str(marker)!r})\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class AutoConfigRemote(LlamaConfig): pass\n"
        "class AutoModelForCausalLMRemote(LlamaForCausalLM): pass\n"
        "class AutoTokenizerRemote(PreTrainedTokenizerFast): pass\n"
    )
    return model


def test_code_in_a_checkpoint_does_not_run(pool, checkpoint, prompts, tmp_path, monkeypatch):
    marker = tmp_path / "ran"
    model = with_code(checkpoint, tmp_path / "model", marker)
    expected = pool.get(checkpoint).greedy(prompts[:2], max_tokens=16)
    engine = pool.get(model, speculative_config=SPEC)
    with engine.counting() as counts:
        assert engine.greedy(prompts[:2], max_tokens=16) == expected
    counts.assert_speculated()
    assert not marker.exists()
    # It would have run for somebody who trusts it.
    from transformers import AutoConfig, dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    AutoConfig.from_pretrained(model, trust_remote_code=True)
    assert marker.exists()


def test_pickled_weights_do_not_run(pool, checkpoint, tmp_path):
    marker = tmp_path / "ran"
    model = with_config(checkpoint, tmp_path / "model")
    (model / "model.safetensors").unlink()
    pickled = pickle.dumps({"lm_head.weight": RunsOnUnpickling(marker)})
    (model / "pytorch_model.bin").write_bytes(pickled)
    with pytest.raises(Exception, match=r"(?i)weights_only|weights only"):
        pool.get(model, speculative_config=SPEC)
    assert not marker.exists()
    pickle.loads(pickled)
    assert marker.exists()


@pytest.mark.slow
def test_a_server_listens_where_plain_vllm_does(checkpoint, tmp_path):
    from servers import Server

    listening = []
    for name, flags in (
        ("plain", []),
        ("layerskip", ["--speculative-model", "[self]", "--exit-layer", "3"]),
    ):
        server = Server(checkpoint, flags, tmp_path / name)
        try:
            listening.append(listeners(server.process.pid))
        finally:
            server.close()
    assert listening[0] == listening[1]
    assert len(listening[0]) >= 1


def listeners(pid: int) -> list[tuple[str, str]]:
    """(kind, address) of every listening socket of a process and its children, sorted."""
    import psutil

    tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return sorted(
        (connection.type.name, connection.laddr.ip)
        for process in tree
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    )
