# SPDX-License-Identifier: Apache-2.0
"""Train a LayerSkip Llama within minutes, for benchmarks with real acceptance.

    python -m benchmarks.decode.train_model --size 160m --minutes 8 --output layerskip-160m
    python -m benchmarks.decode.compare --model layerskip-160m --modes plain layerskip draft-model

The text is Python: the standard library and the machine's packages, without the held-out modules
of ``vllm_layerskip/files/corpus.py``. ``--minutes`` counts from the start to the stored checkpoint;
training takes as many steps as fit after the tokenizer and the texts are ready. ``scores.json`` in
the checkpoint holds the acceptance of every exit layer, so E and K may be chosen afterwards.
"""

from __future__ import annotations

import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast, TrainerCallback

from benchmarks.engines.command_line import make_parser
from benchmarks.engines.results import write_result
from vllm_layerskip.files.corpus import Corpus, load_stdlib, with_packages
from vllm_layerskip.measuring.provenance import provenance
from vllm_layerskip.training.embedded_checkpoint import (
    TrainingPlan,
    encode_blocks,
    load_checkpoint,
    make_trainer,
    save_checkpoint,
    score_model,
)
from vllm_layerskip.training.recipe import Recipe
from vllm_layerskip.training.tokenizer import train_tokenizer

_RECIPE = Recipe(
    max_layer_dropout=0.1, exit_loss_scale=1.0, exit_loss_profile="uniform", rotation=8
)

PLANS = {
    "160m": TrainingPlan(
        vocab_size=16384, hidden_size=768, intermediate_size=2048, num_layers=24,
        num_heads=12, num_kv_heads=4, head_dim=64, seq_len=2560, batch_size=16,
        learning_rate=1e-3, exit_layer=4, num_speculative_tokens=4, recipe=_RECIPE,
    ),
    "300m": TrainingPlan(
        vocab_size=16384, hidden_size=1024, intermediate_size=2816, num_layers=24,
        num_heads=16, num_kv_heads=4, head_dim=64, seq_len=2560, batch_size=16,
        learning_rate=8e-4, exit_layer=4, num_speculative_tokens=4, recipe=_RECIPE,
    ),
    "tiny": TrainingPlan(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_layers=4,
        num_heads=2, num_kv_heads=1, head_dim=32, seq_len=384, batch_size=4,
        learning_rate=3e-3, exit_layer=1, num_speculative_tokens=3,
        recipe=replace(_RECIPE, rotation=2),
    ),
}  # fmt: skip
"""Shapes by size; ``tiny`` is for rehearsals."""

TOKENIZER_CHARS = 20_000_000  # More text makes no better tokenizer, only a slower start.
CALIBRATION_STEPS = 12
RESERVE = 0.1
"""Share of the time that is left for scoring and storing, and for a slower step than measured."""


class _StepTimer(TrainerCallback):
    """Notes when each step ended, on the device too."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.monotonic())

    def step_s(self) -> float:
        """Mean of the later half: the first steps compile and allocate."""
        later = self.times[len(self.times) // 2 :]
        return (later[-1] - later[0]) / (len(later) - 1)


class _Deadline(TrainerCallback):
    """Ends training in time even if steps are slower than they were at the start."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline

    def on_step_end(self, _args: Any, _state: Any, control: Any, **_kwargs: Any) -> None:
        if time.monotonic() > self.deadline:
            control.should_training_stop = True


def fit_plan(
    plan: TrainingPlan,
    tokenizer: PreTrainedTokenizerFast,
    blocks: Dataset,
    deadline: float,
    folder: Path,
) -> TrainingPlan:
    """The plan with as many steps as fit before ``deadline`` (``time.monotonic``).

    Times a few steps of a throw-away model. Learning rate and layer dropout depend on the number
    of steps, so it has to be known before training starts.
    """
    timer = _StepTimer()
    trial = make_trainer(replace(plan, num_steps=CALIBRATION_STEPS), tokenizer, blocks, folder)
    trial.add_callback(timer)
    trial.train()
    num_steps = max(int((deadline - time.monotonic()) / timer.step_s()), CALIBRATION_STEPS)
    print(f"{timer.step_s():.3f} s a step: {num_steps} steps", flush=True)
    return replace(plan, num_steps=num_steps, warmup_steps=max(num_steps // 20, 1))


def train(
    plan: TrainingPlan, corpus: Corpus, output: Path, start: float, seconds: float
) -> dict[str, Any]:
    """Train, store and score within ``seconds`` of ``start``; returns facts for ``scores.json``."""
    tokenizer = train_tokenizer(_sample(corpus), plan.vocab_size, plan.seq_len)
    blocks = encode_blocks(plan, tokenizer, corpus.train)
    deadline = start + (1 - RESERVE) * seconds
    with tempfile.TemporaryDirectory() as folder:
        plan = fit_plan(plan, tokenizer, blocks, deadline, Path(folder))
        trainer = make_trainer(plan, tokenizer, blocks, Path(folder))
        trainer.add_callback(_Deadline(deadline))
        begin = time.monotonic()
        trainer.train()
        train_s = time.monotonic() - begin
    save_checkpoint(plan, trainer.model.cpu(), tokenizer, output)
    num_steps = trainer.state.global_step
    facts = {
        "num_weights": sum(weight.numel() for weight in trainer.model.parameters()),
        "num_corpus_tokens": len(blocks) * plan.seq_len,
        "num_trained_tokens": num_steps * plan.batch_size * plan.seq_len,
        "num_steps": num_steps,
        "train_s": round(train_s, 1),
        "log": trainer.state.log_history,
        "plan": asdict(plan),
    }
    # Scores are those of the stored model, whose weights are bfloat16.
    model = load_checkpoint(output)
    model = model.to("cuda") if torch.cuda.is_available() else model
    scores = score_model(plan, model, tokenizer, corpus, num_prompts=32, num_windows=32)
    return facts | scores


def _sample(corpus: Corpus) -> Iterator[str]:
    num_chars = 0
    for _, text in sorted(corpus.train.items()):
        yield text
        num_chars += len(text)
        if num_chars > TOKENIZER_CHARS:
            return


def main() -> None:
    start = time.monotonic()
    parser = make_parser(__doc__)
    parser.add_argument("--size", choices=sorted(PLANS), default="160m")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--output", type=Path, required=True, help="Folder of the checkpoint.")
    parser.add_argument("--copy-scores", type=Path, help="A second file for scores.json.")
    parser.add_argument("--corpus-mb", type=float, default=120, help="Text to train on at most.")
    parser.add_argument(
        "--packages", nargs="*", type=Path, default=[Path(sysconfig.get_paths()["purelib"])],
        help="Folders of packages to read beside the standard library.",
    )  # fmt: skip
    args = parser.parse_args()
    corpus = with_packages(load_stdlib(), args.packages, int(args.corpus_mb * 1e6))
    facts = train(PLANS[args.size], corpus, args.output, start, 60 * args.minutes)
    facts |= {"corpus_sha256": corpus.digest, "provenance": provenance()}
    for path in filter(None, (args.output / "scores.json", args.copy_scores)):
        write_result(path, facts)
    print(f"{args.output}: {facts['num_weights'] / 1e6:.0f} M weights, {facts['num_steps']} steps,")
    for exit_layer, lengths in facts["acceptance_length"].items():
        print(exit_layer, lengths)
    print(f"{time.monotonic() - start:.0f} s in all")


if __name__ == "__main__":
    main()
