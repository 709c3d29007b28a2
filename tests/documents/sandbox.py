# SPDX-License-Identifier: Apache-2.0
"""A folder in which the documents' commands run as they are written.

It looks like a checkout, and has what the documents call MODEL, prompts.jsonl, run.yaml and so on.
Only what a CPU cannot do within minutes is cut down: ``tools/`` comes first in PATH and adds
arguments to some commands, and ``SHORTER`` shortens a few texts.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

from checkpoints import chatting
from markdown import ROOT, Block

from vllm_layerskip.example_model.pinned import NAME

CHECKPOINT = ROOT / "vllm_layerskip" / "checkpoint"
TOOLS = Path(__file__).parent / "tools"
_PYTHON_TEXT = "def add(a, b):\n    return a + b\n\n\nclass Point:\n    x = 0\n"

SHORTER: dict[str, str] = {
    # Half an hour of training.
    "TrainingPlan(bf16=True).twin()": "TrainingPlan(bf16=True, num_steps=2).twin()",
    # A quarter of an hour of measuring.
    "held_out_functions 38": "held_out_functions 2",
    "--pairs 3:5 9:5 --max-tokens 48": "--repeats 1 --max-tokens 4",
    # CUDA graphs and compilation, which a CPU has no use for.
    '"path/to/a/layerskip-llama",': '"MODEL", enforce_eager=True,',
    "LLM(MODEL, hf_overrides": 'LLM("MODEL", enforce_eager=True, hf_overrides',
}
"""Texts of documents, and what runs in their place."""


OUTPUTS = ("out", "layerskip-model")
"""Folders to remove first: a command refuses one that another document's command wrote."""


def make(folder: Path) -> Path:
    """A new sandbox."""
    for name in ("README.md", "Makefile", "pyproject.toml", "examples", "tools", "tests", ".git"):
        if (ROOT / name).exists():
            (folder / name).symlink_to(ROOT / name)
    # Commands write into these.
    for name in ("docs", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "vllm_layerskip").symlink_to(ROOT / "vllm_layerskip")
    for model in ("MODEL", "path/to/checkpoint"):
        shutil.copytree(CHECKPOINT, folder / model)
    # Stands in for the model that `vllm-layerskip example-model` would get from a package index.
    chatting(folder / ".cache" / "vllm-layerskip" / NAME)
    (folder / "results").mkdir()
    agreement = ROOT / "docs" / "tuning" / "embedded-cpu" / "choice" / "agreement.npz"
    shutil.copy(agreement, folder / "results")
    (folder / "texts").mkdir()
    # Enough for a sequence or two of training.
    (folder / "texts" / "point.txt").write_text(_PYTHON_TEXT * 60)
    for name in ("more.jsonl", "wiki.jsonl"):
        (folder / name).write_text(
            "".join(json.dumps({"text": _PYTHON_TEXT * 20}) + "\n" for _ in range(4))
        )
    prompts = ["def main():\n", "import os\n", "class Reader:\n"]
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    )
    (folder / "path/to/question.jsonl").write_text(
        "".join(
            json.dumps({"question_id": i, "category": f"c{i % 2}", "turns": [prompt]}) + "\n"
            for i, prompt in enumerate(prompts)
        )
    )
    (folder / "run.yaml").write_text(
        json.dumps({
            "model": {"path": "MODEL"},
            "data": {"train": {"files": ["texts/", "more.jsonl"]}, "seq_len": 64},
            "recipe": {"from_scratch": False, "max_layer_dropout": 0.1, "rotation": 3},
            "training": {"max_steps": 2, "per_device_train_batch_size": 1},
            "output": {"folder": "layerskip-model", "exit_layer": 3, "num_speculative_tokens": 2},
        })
    )  # fmt: skip
    return folder


def environment(folder: Path) -> dict[str, str]:
    """Variables of a shell in the sandbox, without network."""
    tools = folder / ".tools"
    if not tools.exists():
        shutil.copytree(TOOLS, tools)
        for tool in tools.iterdir():
            tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    scripts = Path(sys.executable).parent
    # With HOME, below: caches are those of the sandbox.
    own = {name: value for name, value in os.environ.items() if name != "XDG_CACHE_HOME"}
    return {
        **own,
        "PATH": f"{tools}:{scripts}:{os.environ['PATH']}",
        "DOCUMENTS_PYTHON": sys.executable,
        "DOCUMENTS_ENGINE_TESTS": str(ROOT / "tests" / "engine"),
        "PYTHONPATH": str(ROOT),
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "PIP_NO_INDEX": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "HOME": str(folder),
        "TMPDIR": str(folder),
        # A socket's path has at most 107 characters, and pytest's folders are long.
        "RAY_TMPDIR": tempfile.gettempdir(),
    }


def shortened(block: Block) -> str:
    text = block.text
    for long, short in SHORTER.items():
        text = text.replace(long, short)
    return text


def run(block: Block, folder: Path, timeout_s: float = 590) -> str:
    """Run a block and return everything that it printed.

    Raises:
        AssertionError: a command of it failed.
    """
    if block.language == "python":
        script = folder / "block.py"
        script.write_text(shortened(block))
        command = [sys.executable, str(script)]
    else:
        command = ["bash", "-euo", "pipefail", "-c", shortened(block)]
    variables = environment(folder)
    for output in OUTPUTS:
        shutil.rmtree(folder / output, ignore_errors=True)
    if block.language == "python":
        variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    process = subprocess.run(
        command, cwd=folder, env=variables, text=True, timeout=timeout_s, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.returncode == 0, f"{block}: {process.returncode}\n{process.stdout[-5000:]}"
    return process.stdout
