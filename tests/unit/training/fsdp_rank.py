# SPDX-License-Identifier: Apache-2.0
"""One of two ranks of FSDP (torch's ``fully_shard``, as accelerate applies it on GPUs; on a CPU
accelerate itself does not): loss and gradients of a sharded model against a whole one.

Usage: fsdp_rank.py RANK RENDEZVOUS_FILE
"""

import copy
import sys

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, LlamaConfig

from vllm_layerskip.training.loss import ExitLoss, ExitMeter

WEIGHTS = {1: 0.2, 2: 0.3, 3: 0.5}


def run(model, exits_of, batch, kept):
    meter = ExitMeter(4, torch.device("cpu"))
    with ExitLoss(exits_of, WEIGHTS, meter, kept, always_run=True).applied():
        loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach()


def main(rank: int, rendezvous: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=48,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
        )
    )
    whole.train()
    kept = np.ones((4, 2), bool)
    kept[1] = [True, False]
    kept[2] = False  # A whole layer, on both ranks.
    # Each rank has samples of its own; the whole model sees those of both.
    ids = torch.randint(0, 48, (2, 2, 9), generator=torch.Generator().manual_seed(1))
    for checkpointing in (False, True):
        whole.zero_grad()
        losses = [run(whole, whole, {"input_ids": part, "labels": part}, kept) for part in ids]
        sharded = copy.deepcopy(whole)
        sharded.zero_grad()
        if checkpointing:
            sharded.gradient_checkpointing_enable()
        for layer in sharded.model.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        fully_shard(sharded, mesh=mesh, reshard_after_forward=True)
        local = ids[rank]
        loss = run(sharded, sharded, {"input_ids": local, "labels": local}, kept)
        torch.testing.assert_close(loss, losses[rank])
        pairs = zip(sharded.named_parameters(), whole.parameters(), strict=True)
        for (name, one), other in pairs:
            assert one.grad.to_local().numel() < other.numel(), name
            # Ranks' gradients are averaged; the whole model's were summed.
            torch.testing.assert_close(
                one.grad.full_tensor(), other.grad / 2, rtol=1e-4, atol=1e-6, msg=name
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
