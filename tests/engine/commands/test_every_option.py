# SPDX-License-Identifier: Apache-2.0
"""Every option of every command runs once with a legitimate value.

``RUNS`` is the table. A new option that is in no run fails ``test_no_option_is_left_out``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from checkpoints import EMBEDDED, chatting
from safetensors.torch import save_file
from unit.example_model.tiny import write_original

from vllm_layerskip.commands.main import build_parser

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
CHECKPOINT = str(EMBEDDED)
ENGINE_ARGS = json.dumps(
    {"enforce_eager": True, "kv_cache_memory_bytes": 16 << 20, "max_num_seqs": 4}
)
TRAINING = """
model: {model_type: llama, tokenizer: CHECKPOINT, config: {hidden_size: 16, num_hidden_layers: 2,
  num_attention_heads: 2, num_key_value_heads: 2, intermediate_size: 32,
  max_position_embeddings: 64}}
data: {train: {files: [texts.jsonl]}, seq_len: 16, text_field: body}
output: {folder: trained, exit_layer: 1, num_speculative_tokens: 2}
recipe: {rotation: 2}
training: {max_steps: 2, save_steps: 1, per_device_train_batch_size: 1, use_cpu: true,
  report_to: none}
"""


@dataclass(frozen=True)
class Run:
    """A command line, with its files in the working directory."""

    arguments: str
    """Separated by spaces; ``CHECKPOINT`` and ``ENGINE_ARGS`` stand for the constants."""
    check: Callable[[Path, str], object]
    """True, given the working directory and what was printed, if the command did its work."""
    after: tuple[str, ...] = ()
    """Command lines of the same command that must run first."""
    marks: tuple[pytest.MarkDecorator, ...] = ()

    def argv(self, command: str) -> list[list[str]]:
        values = {"CHECKPOINT": CHECKPOINT, "ENGINE_ARGS": ENGINE_ARGS}
        lines = (*self.after, self.arguments)
        return [[command, *(values.get(word, word) for word in line.split())] for line in lines]


def answers(folder: Path) -> list[dict]:
    lines = (folder / "out/output.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def layerskip_block(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["layerskip"]


def _all_answered(folder: Path, num_tokens: int) -> bool:
    assert [a["error"] for a in answers(folder)] == [None] * 3
    return all(len(a["token_ids"]) == num_tokens for a in answers(folder))


def write_adapter(folder: Path) -> None:
    """A draft adapter of the checkpoint's first layer."""
    config = json.loads((EMBEDDED / "config.json").read_text())
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    shapes = {"A": (2, config["hidden_size"]), "B": (config["intermediate_size"], 2)}
    folder.mkdir()
    save_file(
        {name.format(part): torch.full(shape, 0.01) for part, shape in shapes.items()},
        folder / "adapter_model.safetensors",
    )
    lora = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(lora))


def _drafted(printed: str) -> bool:
    return float(printed.rpartition("acceptance length ")[2].rstrip(".\n")) > 1


_TUNE = (
    "--model CHECKPOINT --prompts prompts.txt --device cpu --exit-layers 3,6 --max-tokens 8 "
    "--num-speculative-tokens 1-2 --num-prompts 2 --results results"
)
_GENERATE = "--model CHECKPOINT --input texts.jsonl --text-field body --output out --max-tokens 8"
_SMALL = f"{_GENERATE} --token-ids --ignore-eos --device cpu --engine-args ENGINE_ARGS"

RUNS: dict[str, dict[str, Run]] = {
    "draft-vocab": {
        "all": Run(
            "--model CHECKPOINT --corpus texts.jsonl --text-field body --size 99 --output ids.json",
            lambda folder, printed: len(json.loads((folder / "ids.json").read_text())) == 99,
        ),
    },
    "train": {
        "anew": Run(
            "--config train.yaml --overwrite",
            lambda folder, printed: (folder / "trained/config.json").exists(),
            after=("--config train.yaml",),
            marks=(pytest.mark.slow,),
        ),
        "resumed": Run(
            "--config train.yaml --resume",
            lambda folder, printed: (folder / "trained/config.json").exists(),
        ),
        "workers": Run(
            "--config train.yaml --num-workers 2",
            lambda folder, printed: (folder / "trained/config.json").exists(),
            marks=(pytest.mark.slow,),
        ),
    },
    "eval": {
        "measured": Run(
            "--model CHECKPOINT --compare CHECKPOINT --labels one other --data texts.jsonl "
            "--text-field body --seq-len 16 --stride 8 --bos window --max-tokens 64 "
            "--batch-size 2 --dtype bfloat16 --device cpu --trust-remote-code --json r.json "
            "--markdown r.md --plot r.png",
            lambda folder, printed: (
                (folder / "r.png").stat().st_size > 1000
                and "other" in (folder / "r.md").read_text()
                and "one" in printed
            ),
        ),
        "twin": Run(
            "--model CHECKPOINT --data texts.jsonl --text-field body --seq-len 16 --device cpu "
            "--draft-quantization int4 --draft-adapter adapter --json r.json",
            lambda folder, printed: (
                json.loads((folder / "r.json").read_text())["models"][1]["label"]
                == "checkpoint int4 + adapter adapter"
            ),
        ),
        "shown": Run(
            "--from-json r.json --markdown again.md",
            lambda folder, printed: (
                (folder / "again.md").read_text() == (folder / "r.md").read_text()
            ),
            after=(
                "--model CHECKPOINT --data texts.jsonl --text-field body --seq-len 16 "
                "--json r.json --markdown r.md",
            ),
        ),
    },
    "tune": {
        "predicted": Run(
            f"{_TUNE} --hardware h100 --generator transformers --batch-sizes 1,2 --chat "
            "--max-prompt-tokens 64 --dtype float32 --draft-vocab ids.json --map map.png "
            "--draft-quantization none int4 --draft-adapter none adapter --output config.json",
            lambda folder, printed: (
                layerskip_block(folder)["exit_layer"] in (3, 6)
                and (folder / "map.png").stat().st_size > 1000
            ),
        ),
        "from statistics": Run(
            f"{_TUNE} --hardware h100 --agreement results/agreement.npz --dry-run --batch-sizes 2",
            lambda folder, printed: "No config.json was changed" in printed,
            after=(f"{_TUNE} --hardware h100 --dry-run",),
            marks=(pytest.mark.slow,),
        ),
        "of a field": Run(
            f"{_TUNE.replace('prompts.txt', 'texts.jsonl')} --text-field body --hardware l4 "
            "--dry-run",
            lambda folder, printed: "vllm serve" in printed,
        ),
        "measured": Run(
            f"{_TUNE.replace('3,6', '3').replace('1-2', '2')} --num-measured 0 --repeats 1 "
            "--rounds 1 --cells-per-process 9 --enforce-eager --dry-run "
            "--engine-args {\"max_num_batched_tokens\":256}",
            lambda folder, printed: (folder / "results/cells.csv").read_text().count("\n") >= 3,
            marks=(pytest.mark.slow,),
        ),
        "on a cluster": Run(
            f"{_TUNE.replace('3,6', '3').replace('1-2', '2')} --num-measured 0 --repeats 1 "
            "--cells-per-process 9 --enforce-eager --dry-run --ray --ray-address local "
            "--accelerator-type H100",
            lambda folder, printed: (folder / "results/cells.csv").read_text().count("\n") >= 3,
            marks=(pytest.mark.slow,),
        ),
    },
    "generate": {
        "engine": Run(
            f"{_SMALL} --exit-layer all --num-speculative-tokens 2 --dtype float32 "
            "--draft-quantization int8 --draft-adapter none "
            "--max-model-len 256 --tensor-parallel-size 1 --temperature 0.0 --top-p 0.9 --top-k 9 "
            "--seed 7 --stop nothing that-comes --output-format jsonl",
            lambda folder, printed: _all_answered(folder, 8) and _drafted(printed),
        ),
        "plain, anew": Run(
            f"{_SMALL} --no-speculation --overwrite --max-model-len 256",
            lambda folder, printed: _all_answered(folder, 8) and "acceptance" not in printed,
        ),
        "replicas": Run(
            f"{_SMALL} --num-replicas 1 --ray-address local --rows-per-task 2 --max-model-len 256",
            lambda folder, printed: _all_answered(folder, 8),
            marks=(pytest.mark.slow,),
        ),
    },
    "example-model": {
        "from a folder": Run(
            "FOLDER --from original --overwrite",
            lambda folder, printed: (
                layerskip_block(folder / "FOLDER")["draft_quantization"] == "int4"
                and "vllm serve FOLDER" in printed
            ),
        ),
    },
    "self-chats": {
        "all": Run(
            "--model chatting --num-chats 3 --output chats.jsonl --exclude prompts.txt "
            "--temperature 1.0 --top-p 0.99 --max-question-tokens 40 --max-answer-tokens 20 "
            "--answer-temperature 0.5 --system # --seed 7 --keep-unfinished --overwrite "
            "--max-minutes 9 "
            "--max-num-seqs 4 --tensor-parallel-size 1 --dtype float32 --max-model-len 256 "
            "--device cpu --engine-args ENGINE_ARGS",
            lambda folder, printed: (
                (folder / "chats.jsonl").read_text().count("\n") == 3
                and "3 chats" in printed
                and "tokens/s" in printed
            ),
        ),
    },
}  # fmt: skip


def options(command: str) -> set[str]:
    """All options of a command, but for its help; what has no dashes by its name in the usage."""
    (commands,) = (
        action
        for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    actions: Sequence[argparse.Action] = commands.choices[command]._actions
    return {[action.metavar, *action.option_strings][-1] for action in actions} - {"--help"}


def test_no_command_is_left_out():
    from vllm_layerskip.commands import COMMANDS

    assert set(RUNS) == {command.name for command in COMMANDS}


@pytest.mark.parametrize("command", RUNS)
def test_no_option_is_left_out(command):
    words = {
        word for run in RUNS[command].values() for argv in run.argv(command)[-1:] for word in argv
    }
    assert options(command) - words == set(), "add each to a run of the table"


@pytest.mark.parametrize(
    ("command", "name"),
    [
        pytest.param(command, name, marks=run.marks)
        for command, runs in RUNS.items()
        for name, run in runs.items()
    ],
)
def test_a_legitimate_command_line_does_its_work(command, name, tmp_path):
    texts = [f"import os  # {number}\ndef f(x):\n    return x\n" * 9 for number in range(3)]
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"body": text}) + "\n" for text in texts)
    )
    (tmp_path / "prompts.txt").write_text("def main():\nimport sys\n")
    (tmp_path / "ids.json").write_text(json.dumps([*range(300)]))
    write_adapter(tmp_path / "adapter")
    chatting(tmp_path / "chatting")
    (tmp_path / "train.yaml").write_text(TRAINING.replace("CHECKPOINT", CHECKPOINT))
    if command == "example-model":
        write_original(tmp_path / "original")
    run = RUNS[command][name]
    for argv in run.argv(command):
        process = subprocess.run(
            [sys.executable, "-m", "vllm_layerskip.commands.main", *argv],
            cwd=tmp_path,
            env=ENVIRONMENT,
            text=True,
            timeout=500,
            check=False,
            capture_output=True,
        )
        assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    assert run.check(tmp_path, process.stdout)
