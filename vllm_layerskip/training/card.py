# SPDX-License-Identifier: Apache-2.0
"""The checkpoint's model card, written from its scores so that no number is copied by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Models = Mapping[str, Mapping[str, Any]]
"""Scores of LayerSkip and, if it was trained, of the twin."""

COMMAND = "python -m vllm_layerskip.training --output vllm_layerskip/checkpoint --twin"


NOTES = """The paper's own weights e(l) ("sum") make an exit at a quarter of the depth weigh a few
percent of the last layer. That suits its runs of 26 to 839 billion tokens; within the few
million of this run it left the early exits far behind: an 8-layer model trained so for 4,500
steps reached acceptance length 1.52 at E = 2, K = 5. So this checkpoint weighs all exits alike
("uniform").
"""


def model_card(scores: dict[str, Any]) -> str:
    """Markdown out of ``scores.json``; ``scores["twin"]`` may be missing."""
    models = {"LayerSkip": scores["layerskip"]}
    if "twin" in scores:
        models["twin"] = scores["twin"]
    parts = (
        _introduction(scores["plan"]),
        _facts(scores, models),
        NOTES,
        _results(scores["plan"], models),
    )
    return "\n".join(parts)


def _introduction(plan: Mapping[str, Any]) -> str:
    return f"""---
license: apache-2.0
library_name: transformers
tags: [layerskip, self-speculative-decoding]
---

# A small LayerSkip Llama on Python's standard library

The checkpoint that ships with vllm-layerskip: {plan["num_layers"]} layers, hidden size
{plan["hidden_size"]}, {plan["vocab_size"]} tokens, trained from scratch with layer dropout and
the early-exit loss (arXiv 2404.16710). It exists to show and to test self-speculative decoding
on real text; it is no useful code model.
"""


def _facts(scores: Mapping[str, Any], models: Models) -> str:
    plan, recipe, versions = scores["plan"], scores["plan"]["recipe"], scores["versions"]
    minutes = {
        name: f"{model['seconds'] / 60:.0f} min on {model['num_threads']} thread(s)"
        for name, model in models.items()
    }
    return f"""* **Data:** the sources of Python's standard library (Python {versions["python"]}, without tests,
  tables and generated files). Whole modules are held out, from tokenizer and model alike; the
  list is `HELD_OUT_MODULES` in `vllm_layerskip/files/corpus.py`. SHA-256 over all texts:
  `{scores["corpus_sha256"]}`. The sources are under the PSF licence.
* **Command:** `{COMMAND}`
* **Versions:** Python {versions["python"]}, torch {versions["torch"]}, transformers
  {versions["transformers"]}; seed {plan["seed"]}, bf16 autocast {"on" if plan["bf16"] else "off"}.
* **Training:** {plan["num_steps"]} steps of {plan["batch_size"]} x {plan["seq_len"]} tokens, AdamW,
  peak learning rate {plan["learning_rate"]}, cosine schedule; {_join(minutes)}.
* **Recipe:** p_max {recipe["max_layer_dropout"]} with S(t) from scratch; e_scale
  {recipe["exit_loss_scale"]}, profile "{recipe["exit_loss_profile"]}", {recipe["curriculum"]}
  curriculum{_rotation(recipe)}. All exits share the final norm and the LM head.
* **Weights:** bfloat16; scored as stored, read back in float32.
* **Use:** `exit_layer="auto"` reads E = {plan["exit_layer"]}, K = {plan["num_speculative_tokens"]} from `config.json`.
"""  # noqa: E501


def _results(plan: Mapping[str, Any], models: Models) -> str:
    exit_layer, num_drafts = plan["exit_layer"], plan["num_speculative_tokens"]
    lengths = {
        name: model["acceptance_length"][f"E={exit_layer}"][f"K={num_drafts}"]
        for name, model in models.items()
    }
    sample = models["LayerSkip"]
    return f"""The twin had the same data, steps and seed, no layer dropout, and the loss on the last layer only.

## Acceptance length

Greedy continuations of {sample["num_prompts"]} prompts of {sample["prompt_len"]} tokens from
held-out modules, {sample["num_new_tokens"]} new tokens each, float32. With E = {exit_layer} and
K = {num_drafts}: {_join(lengths)}.

{_acceptance_table(models)}

## Exits on held-out modules

Next-token accuracy and perplexity of every exit.

{_exit_table(models)}
"""  # noqa: E501


def _join(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _rotation(recipe: Mapping[str, Any]) -> str:
    return f", R = {recipe['rotation']}" if recipe["curriculum"] == "rotational" else ""


def _acceptance_table(models: Models) -> str:
    settings = list(models["LayerSkip"]["acceptance_length"]["E=1"])
    header = [f"{name} {setting}" for name in models for setting in settings]
    rows = [
        [exit_name]
        + [
            f"{model['acceptance_length'][exit_name][setting]:.2f}"
            for model in models.values()
            for setting in settings
        ]
        for exit_name in models["LayerSkip"]["acceptance_length"]
    ]
    return _table(["", *header], rows)


def _exit_table(models: Models) -> str:
    header = [f"{name} {what}" for name in models for what in ("accuracy", "perplexity")]
    rows = []
    for exits in zip(*(model["exits"] for model in models.values()), strict=True):
        cells = [f"{e['accuracy']:.1%}" for e in exits], [f"{e['perplexity']:.4g}" for e in exits]
        paired = [cell for pair in zip(*cells, strict=True) for cell in pair]
        rows.append([str(exits[0]["exit_layer"]), *paired])
    return _table(["layers", *header], rows)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
