# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` of a real model, as its folder says to draft: chats, schemas, tools."""

from __future__ import annotations

import json
import re

import pytest
from servers import MODEL_NAME, Server
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

STRUCTURED = {"backend": "xgrammar", "disable_any_whitespace": True}
KV_CACHE_BYTES = 64 << 20
FLAGS = [
    *("--speculative-model", "[self]"),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    *("--max-model-len", "512", "--max-num-seqs", "4"),
    *("--kv-cache-memory-bytes", str(KV_CACHE_BYTES)),
    *("--structured-outputs-config", json.dumps(STRUCTURED)),
]
QUESTION = "What is the capital of France, and what is it known for?"
MAX_TOKENS = 32
CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "pattern": "^[A-Z][a-z]{2,12}$"},
        "country": {"enum": ["France", "Germany", "Italy"]},
        "population_in_millions": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["city", "country", "population_in_millions"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    # vLLM binds arguments to a tool's schema only if the tool says so.
    "function": {"name": "describe_city", "parameters": CITY, "strict": True},
}


@pytest.fixture(scope="module")
def server(example, tmp_path_factory):
    server = Server(example, FLAGS, tmp_path_factory.mktemp("serve") / "log")
    yield server
    server.close()


@pytest.fixture(scope="module")
def plain(pool, example):
    return pool.get(
        example,
        max_model_len=512,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        structured_outputs_config=STRUCTURED,
    )


@pytest.fixture(autouse=True)
def _speculates(server):
    """The server drafts for each test's requests, and drafts are accepted."""
    before = server.counter("num_accepted_tokens_total")
    yield
    assert server.counter("num_accepted_tokens_total") > before


def assert_a_city(text):
    found = json.loads(text)
    assert set(found) == set(CITY["properties"])
    assert re.fullmatch("[A-Z][a-z]{2,12}", found["city"])
    assert found["country"] in CITY["properties"]["country"]["enum"]
    assert 0 <= found["population_in_millions"] <= 99


def test_a_chat_streamed_whole_and_offline(server, plain, ask):
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    (expected,) = plain.generate([ask(QUESTION)], params)
    whole = server.chat(QUESTION, max_tokens=MAX_TOKENS, return_token_ids=True)
    assert whole["prompt_token_ids"] == ask(QUESTION)
    (choice,) = whole["choices"]
    assert choice["token_ids"] == expected
    assert "Paris" in choice["message"]["content"]
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": MAX_TOKENS}
    chunks = server.stream("/v1/chat/completions", {"model": MODEL_NAME, "temperature": 0, **body})
    deltas = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
    assert "".join(deltas) == choice["message"]["content"]
    # A step's tokens come in one chunk: fewer chunks than tokens, if drafts were accepted.
    assert 1 < sum(map(bool, deltas)) < len(expected)


def test_an_answer_in_a_json_schema(server, plain, ask):
    question = "Describe Paris as JSON."
    schema = {"name": "city", "schema": CITY, "strict": True}
    answer = server.chat(
        question,
        max_tokens=64,
        return_token_ids=True,
        response_format={"type": "json_schema", "json_schema": schema},
    )
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "stop"
    assert_a_city(choice["message"]["content"])
    params = SamplingParams(
        temperature=0, max_tokens=64, structured_outputs=StructuredOutputsParams(json=CITY)
    )
    assert plain.generate([ask(question)], params) == [choice["token_ids"]]


@pytest.mark.parametrize(
    "tool_choice",
    ["required", {"type": "function", "function": {"name": "describe_city"}}],
    ids=["required", "named"],
)
def test_a_tool_call_has_the_tools_arguments(server, tool_choice):
    """The model is so small that it calls nothing by itself."""
    answer = server.chat("Describe Rome.", tools=[TOOL], tool_choice=tool_choice, max_tokens=96)
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "describe_city"
    assert_a_city(call["function"]["arguments"])


def test_nothing_went_wrong_unseen(server):
    """After all of the above (tests of a file run in order)."""
    server.chat("Say hello.", max_tokens=8)
    log = server.log.read_text()
    assert not re.findall(r"^.*\b(?:ERROR|Traceback)\b.*$", log, re.M)
    (line,) = (line for line in log.splitlines() if "LayerSkip 0." in line)
    assert "exit_layer 30), 4 speculative tokens" in line
    assert "120 linear layers (int4" in log
