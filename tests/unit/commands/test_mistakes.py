# SPDX-License-Identifier: Apache-2.0
"""Catch a mistake of a user that ends in a traceback: every option gets wrong values.

Each is one line on stderr that names the option, and exit status 2; no engine starts.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from pathlib import Path

import pytest

import vllm_layerskip
from vllm_layerskip.commands import COMMANDS
from vllm_layerskip.commands.main import build_parser, main

MODEL = Path(vllm_layerskip.__file__).parent / "checkpoint"

VALID = {
    "draft-vocab": {"--model": "{model}", "--corpus": "{text}", "--output": "{new}"},
    "train": {"--config": "{config}"},
    "eval": {"--model": "{model}", "--data": "{text}", "--device": "cpu", "--max-tokens": "64"},
    "tune": {
        "--model": "{model}",
        "--prompts": "{text}",
        "--results": "{new}",
        "--num-speculative-tokens": "1",
        "--max-tokens": "8",
        "--device": "cpu",
        "--output": "{other}",
    },
    "generate": {
        "--model": "{model}",
        "--input": "{jsonl}",
        "--output": "{new}",
        "--device": "cpu",
    },
    "example-model": {"FOLDER": "{new}"},
    "self-chats": {
        "--model": "{chat}",
        "--num-chats": "2",
        "--output": "{new}.jsonl",
        "--device": "cpu",
    },
}
"""A command line that is right but for the option under test."""

NOTHING = "/nope/at/all"

WRONG = {
    "draft-vocab": [
        ("--model", NOTHING),
        ("--model", "no/such-name"),
        ("--model", "{empty}"),
        ("--model", "{heads}"),
        ("--corpus", NOTHING),
        ("--corpus", "{binary}"),
        ("--text-field", "absent", {"--corpus": "{jsonl}", "--size": "100"}),
        ("--size", "0"),
        ("--size", "many"),
        ("--size", "1000000000"),
        ("--output", "{empty}"),
        ("--output", NOTHING),
    ],
    "train": [
        ("--config", NOTHING),
        ("--config", "{empty}"),
        ("--config", "{binary}"),
        ("--config", "{bad_yaml}"),
        ("--config", "{text}"),
        ("--config", "{unknown_key}"),
        ("--config", "{no_model}"),
        ("--config", "{no_data}"),
        ("--config", "{bad_shape}"),
        ("--config", "{bad_config}"),
        ("--config", "{no_reports}"),
        ("--config", "{no_optimizer}"),
        ("--config", "{no_attention}"),
        ("--config", "{deep_draft}"),
        ("--config", "{dropped_draft}"),
        ("--num-workers", "0"),
        ("--num-workers", "two"),
    ],
    "eval": [
        ("--model", NOTHING),
        ("--model", "no/such-name"),
        ("--model", "{empty}"),
        ("--from-json", NOTHING, {"--model": None, "--data": None, "--max-tokens": None}),
        ("--from-json", "{jsonl}", {"--model": None, "--data": None, "--max-tokens": None}),
        ("--from-json", "{binary}", {"--model": None, "--data": None, "--max-tokens": None}),
        ("--compare", NOTHING),
        ("--compare", "no/such-name"),
        ("--labels", "a b"),
        ("--draft-quantization", "int2"),
        ("--draft-quantization", "int4", {"--compare": "{model}"}),
        ("--draft-adapter", NOTHING),
        ("--draft-adapter", "{empty}"),
        ("--draft-adapter", "{text}"),
        ("--data", NOTHING),
        ("--data", "{binary}"),
        ("--text-field", "absent", {"--data": "{jsonl}"}),
        ("--seq-len", "1"),
        ("--seq-len", "100000"),
        ("--stride", "0"),
        ("--stride", "100000"),
        ("--bos", "nowhere"),
        ("--max-tokens", "1"),
        ("--batch-size", "0"),
        ("--dtype", "nonsense"),
        ("--device", "cuda"),
        ("--device", "nonsense"),
        ("--json", "{empty}"),
        ("--markdown", NOTHING),
        ("--plot", NOTHING),
        ("--plot", "plot.doc"),
    ],
    "tune": [
        ("--model", NOTHING),
        ("--model", "no/such-name"),
        ("--model", "{empty}"),
        ("--prompts", NOTHING),
        ("--prompts", "{binary}"),
        ("--text-field", "absent", {"--prompts": "{jsonl}"}),
        ("--exit-layers", "99"),
        ("--exit-layers", "a-b"),
        ("--exit-layers", "all"),
        ("--draft-quantization", "int2"),
        ("--draft-quantization", "none", {"--exit-layers": "all"}),
        ("--draft-adapter", NOTHING),
        ("--draft-adapter", "{empty}"),
        ("--draft-adapter", "{text}"),
        ("--num-speculative-tokens", "0"),
        ("--num-speculative-tokens", "99"),
        ("--batch-sizes", "0"),
        ("--batch-sizes", ""),
        ("--num-prompts", "0"),
        ("--max-prompt-tokens", "0"),
        ("--max-prompt-tokens", "1"),
        ("--max-tokens", "1"),
        ("--max-tokens", "1000000"),
        ("--dtype", "nonsense"),
        ("--device", "cuda"),
        ("--device", "tpu"),
        ("--draft-vocab", NOTHING),
        ("--draft-vocab", "{text}"),
        ("--engine-args", "max_num_seqs"),
        ("--engine-args", "[1]"),
        ("--engine-args", '{"max_num_seq": 1}'),
        ("--engine-args", '{"block_size": "x"}'),
        ("--engine-args", '{"tensor_parallel_size": 3}'),
        ("--engine-args", '{"tensor_parallel_size": "3"}'),
        ("--num-measured", "some"),
        ("--num-measured", "-1"),
        ("--hardware", "abacus"),
        ("--repeats", "0"),
        ("--rounds", "0"),
        ("--cells-per-process", "0"),
        ("--generator", "pencil"),
        ("--agreement", NOTHING),
        ("--agreement", "{binary}"),
        ("--ray-address", "127.0.0.1:1"),
        ("--ray-address", "ray://127.0.0.1:1"),
        ("--ray-address", "nonsense"),
        ("--accelerator-type", "H100"),
        ("--results", "{text}"),
        ("--map", NOTHING + ".png"),
        ("--map", "map.doc"),
        ("--output", NOTHING),
    ],
    "generate": [
        ("--model", NOTHING),
        ("--model", "no/such-name"),
        ("--model", "{empty}"),
        ("--model", "{heads}"),
        ("--input", NOTHING),
        ("--input", "{empty}"),
        ("--output", "{text}"),
        ("--output-format", "xml"),
        ("--temperature", "-1"),
        ("--temperature", "nan"),
        ("--temperature", "warm"),
        ("--top-p", "2"),
        ("--top-k", "-3"),
        ("--max-tokens", "0"),
        ("--stop", ""),
        ("--seed", str(2**70)),
        ("--exit-layer", "99"),
        ("--exit-layer", "0"),
        ("--exit-layer", "eight"),
        ("--exit-layer", "auto", {"--model": "{no_block}"}),
        ("--exit-layer", "all"),
        ("--num-speculative-tokens", "0"),
        ("--num-speculative-tokens", "-1"),
        ("--num-speculative-tokens", "two"),
        ("--draft-quantization", "int3"),
        ("--draft-adapter", NOTHING),
        ("--draft-adapter", "{empty}"),
        ("--tensor-parallel-size", "0"),
        ("--tensor-parallel-size", "3"),
        ("--dtype", "nonsense"),
        ("--max-model-len", "1000000"),
        ("--max-model-len", "-7"),
        ("--device", "cuda"),
        ("--device", "tpu"),
        ("--engine-args", "max_num_seqs=1"),
        ("--engine-args", '{"max_num_seq": 1}'),
        ("--engine-args", '{"max_num_seqs": "many"}'),
        ("--engine-args", '{"max_num_seqs": 0}'),
        ("--engine-args", '{"gpu_memory_utilization": 7}'),
        ("--engine-args", '{"quantization": "nonsense"}'),
        ("--engine-args", '{"scheduler_cls": "no.such.Class"}'),
        ("--engine-args", '{"enable_lora": true, "max_loras": 0}'),
        ("--engine-args", '{"compilation_config": {"mode": "nonsense"}}'),
        ("--engine-args", '{"pipeline_parallel_size": 2}'),
        ("--engine-args", '{"tokenizer": "/nope/at/all"}'),
        ("--engine-args", '{"model": "other"}'),
        ("--num-replicas", "0"),
        ("--ray-address", "127.0.0.1:1"),
        ("--ray-address", "ray://127.0.0.1:1"),
        ("--ray-address", "nonsense"),
        ("--rows-per-task", "0"),
    ],
    "example-model": [
        ("FOLDER", "{text}"),
        ("FOLDER", "{text}/below"),
        ("FOLDER", "{model}"),
        ("--from", NOTHING),
        ("--from", NOTHING + ".whl"),
        ("--from", "{empty}"),
        ("--from", "{text}"),
        ("--from", "{model}"),
    ],
    "self-chats": [
        ("--model", NOTHING),
        ("--model", "no/such-name"),
        ("--model", "{empty}"),
        ("--model", "{model}"),
        ("--num-chats", "0"),
        ("--num-chats", "some"),
        ("--output", "{text}"),
        ("--output", "{empty}"),
        ("--output", "chats.parquet"),
        ("--output", NOTHING),
        ("--output", "/proc/nope/chats.jsonl"),
        ("--exclude", NOTHING),
        ("--exclude", "{binary}"),
        ("--exclude", "{unfit}"),
        ("--temperature", "0"),
        ("--temperature", "nan"),
        ("--temperature", "3"),
        ("--top-p", "0"),
        ("--top-p", "1.1"),
        ("--max-question-tokens", "0"),
        ("--max-answer-tokens", "0"),
        ("--max-minutes", "0"),
        ("--max-minutes", "inf"),
        ("--answer-temperature", "-1"),
        ("--system", " "),
        ("--seed", "-1"),
        ("--seed", str(2**70)),
        ("--max-num-seqs", "0"),
        ("--tensor-parallel-size", "0"),
        ("--tensor-parallel-size", "3"),
        ("--dtype", "nonsense"),
        ("--max-model-len", "1000000"),
        ("--max-model-len", "-7"),
        ("--device", "cuda"),
        ("--device", "tpu"),
        ("--engine-args", "max_num_seqs=1"),
        ("--engine-args", '{"max_num_seq": 1}'),
        ("--engine-args", '{"max_num_seqs": "many"}'),
        ("--engine-args", '{"model": "other"}'),
        ("--engine-args", '{"speculative_config": {}}'),
        ("--engine-args", '{"tokenizer": "/nope/at/all"}'),
    ],
}
"""Wrong values of each option, and what else the command line then has (None: not that option)."""

ANYTHING_GOES = {
    ("generate", "--text-field"): "a row without the field is answered with an error",
}
"""Options of which no value is wrong by itself."""

CONFIG = """
model: {path: "{model}"}
data: {train: {files: "{text}"}, seq_len: 16}
output: {folder: "{trained}"}
training: {max_steps: 1, use_cpu: true}
"""


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """What the command lines name."""
    folder = tmp_path_factory.mktemp("mistakes")
    found = {name: str(folder / name) for name in ("other", "empty")}
    Path(found["empty"]).mkdir()
    found["model"] = str(shutil.copytree(MODEL, folder / "model"))
    found["no_block"] = str(shutil.copytree(MODEL, folder / "no_block"))
    config = json.loads((MODEL / "config.json").read_text())
    del config["layerskip"]
    Path(found["no_block"], "config.json").write_text(json.dumps(config))

    found["chat"] = str(shutil.copytree(MODEL, folder / "chat"))
    turns = "{% for m in messages %}{{ bos_token + m['content'] + eos_token }}{% endfor %}"
    Path(found["chat"], "chat_template.jinja").write_text(turns)

    # Heads that do not divide the hidden size.
    found["heads"] = str(shutil.copytree(MODEL, folder / "heads"))
    Path(found["heads"], "config.json").write_text(json.dumps(config | {"num_attention_heads": 7}))

    def write(name, content):
        path = folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        found[path.stem] = str(path)

    write("text.txt", "import os\nfor i in range(8):\n    print(os.getcwd(), i)\n" * 20)
    write("jsonl.jsonl", json.dumps({"prompt": "import os"}) + "\n")
    write("unfit.jsonl", '{"answer": 42}\n')
    write("binary.bin", bytes(range(256)))
    text = CONFIG
    found["trained"] = str(folder / "trained")
    for name in ("model", "text", "trained"):
        text = text.replace(f"{{{name}}}", found[name])
    write("config.yaml", text)
    write("bad_yaml.yaml", "model: {path: [")
    write("unknown_key.yaml", text.replace("max_steps", "max_step"))
    write("no_model.yaml", text.replace(found["model"], NOTHING))
    write("no_data.yaml", text.replace(found["text"], NOTHING))
    write("bad_config.yaml", text.replace(found["model"], found["heads"]))
    shape = "{model_type: llama, tokenizer: MODEL, config: {num_attention_heads: 7}}"
    from_scratch = shape.replace("MODEL", found["model"])
    write("bad_shape.yaml", text.replace(f'{{path: "{found["model"]}"}}', from_scratch))
    write("no_reports.yaml", text.replace("use_cpu", "report_to: wandb, use_cpu"))
    write("no_optimizer.yaml", text.replace("use_cpu", "optim: adamw_bnb_8bit, use_cpu"))
    flash = "attn_implementation: flash_attention_2, path:"
    write("no_attention.yaml", text.replace("path:", flash))
    write("deep_draft.yaml", text + "recipe: {target: frozen, exit_layer: 12}")
    dropped = "recipe: {target: frozen, exit_layer: 2, max_layer_dropout: 0.1}"
    write("dropped_draft.yaml", text + dropped)
    return found


@pytest.fixture(autouse=True)
def _no_engine(monkeypatch, tmp_path):
    """An engine that starts is no mistake that was found; jobs of `tune` run in this process."""
    from vllm.v1.engine.llm_engine import LLMEngine

    from vllm_layerskip.tuning import process_jobs, worker

    def start(*args, **kwargs):
        pytest.fail("an engine started")

    monkeypatch.setattr(LLMEngine, "__init__", start)
    monkeypatch.setattr(process_jobs, "run_job", lambda request, *_: worker.results(request))
    # vLLM's logger writes to what was stdout when vLLM was imported: an earlier test's.
    monkeypatch.setattr(logging, "raiseExceptions", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)


def command_line(command, changes, paths):
    """Arguments; ``{name}`` stands for a path."""
    argv = [command]
    for option, value in {**VALID[command], **changes}.items():
        if option == "--labels":
            argv += [option, *value.split()]
        elif not option.startswith("-"):
            argv.append(value)
        elif value is not None:
            argv.append(f"{option}={value}")
    for name, path in paths.items():
        argv = [part.replace(f"{{{name}}}", path) for part in argv]
    return argv


def status_of(argv):
    try:
        return main(argv)
    except SystemExit as stop:  # argparse's own errors.
        return stop.code


@pytest.mark.parametrize(
    ("command", "case"),
    [
        pytest.param(command, case, id=f"{command} {case[0]} {case[1]}")
        for command, cases in WRONG.items()
        for case in cases
    ],
)
def test_a_mistake_is_one_line_that_names_the_option(command, case, paths, capfd, tmp_path):
    new = tmp_path / "new"
    option, value, *more = case
    changes = {option: value, **(more[0] if more else {})}
    assert status_of(command_line(command, changes, {**paths, "new": str(new)})) == 2
    *before, line = capfd.readouterr().err.splitlines()
    assert line.startswith(f"vllm-layerskip {command}: error: ")
    assert option in line or option.lstrip("-").replace("-", "_") in line
    assert [other for other in before if not is_progress(other)] == []
    assert not new.exists() or command == "tune"  # Its logs are there.


def is_progress(line):
    return not line.strip() or line.endswith("/s]") or line.startswith("Reading every exit")


def options_with_a_value(command):
    (subparsers,) = (
        action for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )  # fmt: skip
    actions = subparsers.choices[command]._actions
    valued = (action for action in actions if action.nargs != 0)
    return {[action.metavar, *action.option_strings][-1] for action in valued}


@pytest.mark.parametrize("command", [command.name for command in COMMANDS])
def test_every_option_has_a_wrong_value(command):
    """A new option gets one, or says why it needs none."""
    tried = {case[0] for case in WRONG[command]}
    free = {option for name, option in ANYTHING_GOES if name == command}
    assert options_with_a_value(command) - free == tried
