# SPDX-License-Identifier: Apache-2.0
"""`generate` and `vllm serve` make the same prompt, and give the same answer, for the same chat.

tests/unit/chats/test_chat.py compares prompts for many templates and chats; here both run whole.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from checkpoints import EMBEDDED
from servers import MODEL_NAME, Server
from unit.chat_templates import CHATML

from vllm_layerskip.chats.chat import chat_token_ids
from vllm_layerskip.files.tokenizers import load_tokenizer

MAX_TOKENS = 16
TOOLS = [
    {
        "function": {"name": "add", "parameters": {"type": "object", "required": ["left"]}},
        "type": "function",
    }
]
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"left": 1}'}}
TEXT = "import os\nimport sys\n\n\ndef main("
CHATS = [
    {"messages": [{"role": "user", "content": TEXT}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": TEXT}]}]},
    {"messages": [{"role": "user", "content": ["import os", {"type": "text", "text": TEXT}]}]},
    {"messages": [{"role": "user", "content": TEXT}], "tools": TOOLS},
    {
        "messages": [
            {"role": "system", "content": "def add(left, right):"},
            {"role": "user", "content": "add"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": [{"type": "text", "text": TEXT}], "tool_call_id": "1"},
        ],
        "tools": TOOLS,
    },
]
IMAGE = {"type": "image_url", "image_url": {"url": "http://x/y.png"}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The embedded checkpoint with the chat template of a family."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(EMBEDDED, folder)
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


@pytest.fixture(scope="module")
def answers(checkpoint, tmp_path_factory):
    """What `vllm serve` with LayerSkip makes of the chats: ids of prompts and of answers."""
    log = tmp_path_factory.mktemp("serve") / "log"
    server = Server(checkpoint, ["--speculative-model", "[self]"], log)
    try:
        found = []
        for chat in CHATS:
            body = {"model": MODEL_NAME, **chat}
            tokenized = json.loads(server.post("/tokenize", body))["tokens"]
            body |= {"temperature": 0, "max_tokens": MAX_TOKENS, "return_token_ids": True}
            answer = json.loads(server.post("/v1/chat/completions", body | {"tool_choice": "none"}))
            assert answer["prompt_token_ids"] == tokenized
            found.append((tokenized, answer["choices"][0]["token_ids"]))
        assert server.counter("num_accepted_tokens_total") > 0
    finally:
        server.close()
    return found


@pytest.mark.slow
def test_prompts_and_answers_are_the_servers(checkpoint, answers, tmp_path):
    tokenizer = load_tokenizer(str(checkpoint), "--model")
    prompts = [chat_token_ids(tokenizer, chat["messages"], chat.get("tools")) for chat in CHATS]
    assert prompts == [prompt for prompt, _ in answers]
    rows = [*CHATS, {"messages": [{"role": "user", "content": [IMAGE]}]}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    engine = {"enforce_eager": True, "max_model_len": 256, "kv_cache_memory_bytes": 16 << 20}
    command = [
        *(sys.executable, "-m", "vllm_layerskip.commands.main", "generate", "--token-ids"),
        *("--model", checkpoint, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out"),
        *("--max-tokens", str(MAX_TOKENS), "--dtype", "float32"),
        *("--engine-args", json.dumps(engine)),
    ]
    process = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, text=True, timeout=300, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout[-6000:]
    *outputs, refused = map(
        json.loads, (tmp_path / "out" / "output.jsonl").read_text().splitlines()
    )
    assert "Only text is served" in refused["error"]
    assert [output["token_ids"] for output in outputs] == [ids for _, ids in answers]
    assert [output["num_prompt_tokens"] for output in outputs] == list(map(len, prompts))
    assert [output.get("tools") for output in outputs] == [chat.get("tools") for chat in CHATS]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["acceptance_length"] > 1
