# SPDX-License-Identifier: Apache-2.0
"""The finished draft adapter: an ordinary folder of peft, with a record for serving and a card."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers.utils import cached_file

from vllm_layerskip import __version__
from vllm_layerskip.config.draft_vocab import write_token_ids
from vllm_layerskip.errors import UserError
from vllm_layerskip.files.whole import UNFINISHED, replace_folder, write_json, write_text
from vllm_layerskip.training.config import ModelConfig, OutputConfig
from vllm_layerskip.training.drafts.recipe import DraftRecipe
from vllm_layerskip.training.output import save_adapters
from vllm_layerskip.twins.adapter_config import RECORD_NAME
from vllm_layerskip.twins.digest import checkpoint_digest

VOCAB_NAME = "draft_vocab.json"
"""In the adapter's folder, if it was trained with a draft vocabulary."""


def base_digest(model: ModelConfig) -> str | None:
    """The digest of the checkpoint's weights; it must be on this machine.

    Raises:
        UserError: its weights cannot be read.
    """
    folder = Path(str(model.path))
    if not folder.is_dir():
        file = cached_file(model.path, "config.json", revision=model.revision)
        folder = Path(str(file)).parent
    try:
        return checkpoint_digest(folder)
    except ValueError as error:
        raise UserError(f"model.path: {error}") from None


def record(
    model: ModelConfig, recipe: DraftRecipe, digest: str | None, scores: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of ``layerskip_adapter.json``."""
    return {
        "base_model": model.path,
        "base_digest": digest,
        "exit_layer": recipe.exit_layer,
        "recipe": {
            "target": recipe.target,
            "distill": recipe.distill,
            "num_speculative_tokens": recipe.num_speculative_tokens,
            "final_norm": recipe.final_norm,
            "exit_translator": recipe.exit_translator,
            "draft_vocab": None if recipe.draft_vocab is None else VOCAB_NAME,
        },
        "scores": dict(scores),
        "version": __version__,
    }


def write_adapter(
    output: OutputConfig,
    model: PeftModel,
    state_dict: Mapping[str, torch.Tensor],
    content: Mapping[str, Any],
    draft_vocab: Sequence[int] | None = None,
) -> None:
    """Write ``output.folder``, whole or not at all; an existing one is replaced.

    Args:
        state_dict: the weights of ``model``, adapters among them.
        content: ``record``.
        draft_vocab: the ids that drafts were trained with; they go into the folder.
    """
    folder = output.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f"{UNFINISHED}-{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    dtype = None if output.dtype == "auto" else getattr(torch, output.dtype)
    save_adapters(model, unfinished, state_dict, dtype)
    write_json(unfinished / RECORD_NAME, content)
    if draft_vocab is not None:
        write_token_ids(unfinished / VOCAB_NAME, draft_vocab)
    write_text(unfinished / "README.md", card(folder, model, content))
    replace_folder(unfinished, folder)


def card(folder: Path, model: PeftModel, content: Mapping[str, Any]) -> str:
    """The model card, from the record."""
    scores, recipe, lora = content["scores"], content["recipe"], model.active_peft_config
    before, after = scores["before"], scores["after"]
    num_drafts, exit_layer = scores["num_speculative_tokens"], content["exit_layer"]
    learnt = {"kl": "its distribution (KL)", "argmax": "its argmax", "both": "both KL and argmax"}
    base, is_local = content["base_model"], Path(content["base_model"]).is_dir()
    base_line = "" if is_local else f"base_model: {base}\n"
    norm = "; a final norm of its own" if recipe["final_norm"] else ""
    if recipe["exit_translator"]:
        norm = "; a final norm of its own, and a linear map (translator) behind it"
    vocab = f" --draft-vocab {folder.name}/{VOCAB_NAME}" if recipe["draft_vocab"] else ""
    return f"""---
{base_line}library_name: peft
tags: [layerskip, self-speculative-decoding, draft-adapter]
---

# A draft adapter for {base}

LoRA on layers 0..{exit_layer - 1}, for the draft passes of vllm-layerskip alone: verification runs
the base model as it is, so the output is the base model's.

* **Base model:** `{base}`, digest of its weights `{content["base_digest"]}`. The
  adapter fits no other.
* **Exit layer:** E = {exit_layer}.
* **Rank:** r = {lora.r}, alpha = {lora.lora_alpha}, on {", ".join(sorted(lora.target_modules))}{norm}.
* **Learnt from the last layer:** {learnt[recipe["distill"]]}, for up to
  {recipe["num_speculative_tokens"]} drafts a step.
* **Use:** `--exit-layer {exit_layer} --draft-adapter {folder.name}{vocab}`
* **Made by** vllm-layerskip {content["version"]}.

| held-out text, {scores["num_tokens"]} tokens | without the adapter | with it |
| --- | --- | --- |
| agreement with the last layer | {before["agreement"]:.1%} | {after["agreement"]:.1%} |
| acceptance length at K = {num_drafts} | {before["acceptance_length"]:.2f} | {after["acceptance_length"]:.2f} |

Both are predicted on the text as it stands, with the arithmetic of the training run and full-width
weights. Text that the model writes itself is often easier, and a rounded twin agrees a little less.
"""  # noqa: E501
