# SPDX-License-Identifier: Apache-2.0
"""Catch advice that the next run refuses."""

from __future__ import annotations

import json

import pytest

from vllm_layerskip import embedded_checkpoint
from vllm_layerskip.errors import UserError
from vllm_layerskip.training.config import TrainConfig
from vllm_layerskip.training.rank import check_run


@pytest.mark.parametrize(
    ("model", "advice"),
    [
        ("path", "with model.path the size is the checkpoint's"),
        ("scratch", "Set model.config.vocab_size to at least"),
    ],
)
def test_a_tokenizer_with_too_many_tokens(tmp_path, model, advice):
    """`model.config` belongs to models from scratch."""
    (tmp_path / "text.txt").write_text("import os\n" * 50)
    shape = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 8, "num_attention_heads": 4}
    if model == "path":
        small = tmp_path / "small"
        small.mkdir()
        config = json.loads((embedded_checkpoint() / "config.json").read_text())
        (small / "config.json").write_text(json.dumps(config | shape))
        given = {"path": str(small)}
    else:
        given = {"model_type": "llama", "config": shape}
    plan = TrainConfig.from_dict({
        "model": {**given, "tokenizer": str(embedded_checkpoint())},
        "data": {"train": {"files": str(tmp_path / "text.txt")}, "seq_len": 16},
        "output": {"folder": str(tmp_path / "out")},
        "training": {"use_cpu": True},
    })  # fmt: skip
    with pytest.raises(UserError, match=r"model.tokenizer: it yields token id") as failed:
        check_run(plan, num_ranks=1, resume=False, overwrite=False)
    assert advice in str(failed.value)
    assert ("model.config" in str(failed.value)) == (model == "scratch")
