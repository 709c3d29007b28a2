# SPDX-License-Identifier: Apache-2.0
"""One of two tensor-parallel ranks that check a draft head; started by test_draft_head.py.

Usage: draft_head_rank.py RANK RENDEZVOUS_FILE
"""

from __future__ import annotations

import sys
from itertools import product

import pytest
import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from vllm_layerskip.config.draft_vocab import DraftVocab
from vllm_layerskip.models.exit_head import ExitHead
from vllm_layerskip.worker import draft_head
from vllm_layerskip.worker.draft_head import DraftHead

VOCAB_SIZE, HIDDEN_SIZE, NUM_ROWS = 200, 16, 5  # 100 rows a rank, of 128 with padding.
DRAFT_VOCABS = {
    "one rank's rows": range(0, 90, 2),
    "a single row": [150],
    "rows of both ranks": [199, 3, 99, 100, 101, 128, 127, 64, 0],
    "more than is copied at once": range(5, 190),
    "all rows": range(VOCAB_SIZE),
}


class Weights(nn.Module):
    """Stands in for vLLM's own model class."""

    def load_weights(self, weights):
        for name, full in weights:
            parameter = getattr(self.lm_head, name)
            self.lm_head.weight_loader(parameter, full)
        self.lm_head.quant_method.process_weights_after_loading(self.lm_head)


class Model(ExitHead, Weights):
    def __init__(self, bias, scale, soft_cap, dtype, disable_tp=False):
        super().__init__()
        self.lm_head = ParallelLMHead(
            VOCAB_SIZE, HIDDEN_SIZE, bias=bias, params_dtype=dtype, disable_tp=disable_tp
        )
        self.logits_processor = LogitsProcessor(VOCAB_SIZE, scale=scale, soft_cap=soft_cap)

    def compute_logits(self, hidden_states):
        # Something of the model's own, which a draft head must not lose.
        return self.logits_processor(self.lm_head, hidden_states / 2, self.lm_head.bias)


def load(model, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = {"weight": torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=generator)}
    if model.lm_head.bias is not None:
        weights["bias"] = torch.randn(VOCAB_SIZE, generator=generator)
    # Equal logits: the lower id must win, on whichever rank it is.
    for tensor in weights.values():
        tensor[101] = tensor[3]
    model.load_weights((name, tensor.to(model.lm_head.weight)) for name, tensor in weights.items())


def check_outputs(model, head, token_ids, draft_logits):
    hidden_states = torch.randn(NUM_ROWS, HIDDEN_SIZE, generator=torch.Generator().manual_seed(1))
    hidden_states = hidden_states.to(model.lm_head.weight.dtype)
    full = model.compute_logits(hidden_states)
    assert full.shape == (NUM_ROWS, VOCAB_SIZE)
    assert model.get_top_tokens(hidden_states * 0.5).tolist() == full.argmax(-1).tolist()
    ids = torch.tensor(sorted(token_ids))
    expected = torch.full_like(full, -float("inf"))
    expected[:, ids] = full[:, ids]
    if draft_logits is not None:
        logits = head.compute_logits(hidden_states)
        assert logits.dtype == draft_logits.dtype
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    top = head.get_top_tokens(hidden_states * 0.5)
    assert top.tolist() == expected.argmax(-1).tolist()


def check_settings():
    """Bias, scale, soft cap, dtype: whatever the model's head does, the draft head does."""
    for bias, scale, soft_cap, dtype, (name, token_ids) in product(
        (False, True),
        (1.0, 0.25),
        (None, 3.0),
        (torch.float32, torch.bfloat16),
        DRAFT_VOCABS.items(),
    ):
        model = Model(bias, scale, soft_cap, dtype)
        load(model, seed=0)
        draft_logits = torch.zeros(NUM_ROWS + 2, 3, VOCAB_SIZE, dtype=dtype)
        head = DraftHead(model, vocab(token_ids), draft_logits)
        try:
            check_outputs(model, head, token_ids, draft_logits)
        except AssertionError as error:
            raise AssertionError(f"{name}, {bias=} {scale=} {soft_cap=} {dtype=}") from error


def vocab(token_ids):
    return DraftVocab("test", tuple(sorted(token_ids)))


def check_rows_are_dealt_out_evenly(rank):
    """The rows of one rank are read by both; 64 is vLLM's padding."""
    model = Model(False, 1.0, None, torch.float32)
    load(model, seed=0)
    head = DraftHead(model, vocab(range(90)), None).lm_head
    assert head.weight.shape == (64, HIDDEN_SIZE)
    assert head.num_org_embeddings_per_partition == (64, 26)[rank]
    assert head.weight[26:].count_nonzero() == (38 * HIDDEN_SIZE if rank == 0 else 0)


def check_a_head_that_is_not_split():
    model = Model(True, 1.0, None, torch.float32, disable_tp=True)
    load(model, seed=0)
    head = DraftHead(model, vocab([5, 150, 199]), None)
    assert head.lm_head.tp_size == 1
    check_outputs(model, head, [5, 150, 199], None)


def check_reloaded_weights():
    """The rows follow the model's in place; until then nothing is copied."""
    model = Model(True, 1.0, None, torch.float32)
    load(model, seed=0)
    draft_logits = torch.zeros(NUM_ROWS, 1, VOCAB_SIZE)
    token_ids = range(1, VOCAB_SIZE, 2)
    head = DraftHead(model, vocab(token_ids), draft_logits)
    tensors = [head.token_ids, head._full_logits, *head.lm_head.parameters()]
    addresses = [tensor.data_ptr() for tensor in tensors]
    kept = [tensor.clone() for tensor in tensors]
    head.refresh()
    load(model, seed=1)
    for tensor, old in zip(tensors, kept, strict=True):
        assert torch.equal(tensor, old)
    for tensor in tensors:
        tensor.zero_()  # What sleep level 2 leaves behind.
    head.refresh()
    assert [tensor.data_ptr() for tensor in tensors] == addresses
    assert not torch.equal(head.lm_head.weight, kept[2])
    check_outputs(model, head, token_ids, draft_logits)


def check_a_packed_head_is_refused():
    for change in ("method", "weight"):
        model = Model(False, 1.0, None, torch.float32)
        if change == "method":
            model.lm_head.quant_method = type("PackedMethod", (), {})()
        else:  # As vLLM leaves it on a CPU once a linear layer's weight is packed.
            model.lm_head.quant_method = UnquantizedLinearMethod()
            model.lm_head.weight = nn.Parameter(torch.empty(0), requires_grad=False)
        with pytest.raises(ValueError, match="^test needs the rows") as error:
            DraftHead(model, vocab([5]), None)
        for words in ("Method", "draft_vocab='none'", "quantised"):
            assert words in str(error.value)


def main() -> None:
    rank = int(sys.argv[1])
    draft_head._ROWS_AT_ONCE = 16  # Pieces that do not end where the shards do.
    with set_current_vllm_config(VllmConfig()), torch.inference_mode():
        init_distributed_environment(2, rank, f"file://{sys.argv[2]}", rank, backend="gloo")
        initialize_model_parallel(2)
        check_settings()
        check_rows_are_dealt_out_evenly(rank)
        check_a_head_that_is_not_split()
        check_reloaded_weights()
        check_a_packed_head_is_refused()
    print("all checks passed", flush=True)


if __name__ == "__main__":
    main()
