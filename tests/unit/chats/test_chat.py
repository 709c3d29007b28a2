# SPDX-License-Identifier: Apache-2.0
"""Catch a chat that becomes another prompt here than in `vllm serve`, loses its tools, or is
rendered though it holds what no text model can read.

The judge is vLLM's own code of the server: its request's model, its renderer, its tokenizer.
"""

from __future__ import annotations

import asyncio
import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from unit.chat_templates import (
    CHATML,
    GEMMA,
    LLAMA3,
    MACRO,
    MARKED,
    MISTRAL,
    PARTS,
    PLAIN,
    R1,
    TEMPLATES,
    tokenizer_with,
)  # fmt: skip
from vllm_layerskip.chats.chat import chat_token_ids
from vllm_layerskip.chats.content_format import content_format

USER = {"role": "user", "content": "import os"}
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": "import sys"}
TOOLS = [
    {
        "function": {
            "parameters": {
                "type": "object",
                "properties": {"b": {"type": "string", "default": None}, "a": {"type": "integer"}},
            },
            "name": "add",
            "extra": 1,
        },
        "type": "function",
    },
    {"type": "function", "function": {"name": "now", "description": "time", "strict": True}},
]
CALL = {
    "function": {"name": "add", "arguments": '{"b": "x", "a": null}'},
    "type": "function",
    "id": "call_1",
}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "left"}


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


CHATS: dict[str, list[dict[str, Any]]] = {
    "plain": [USER],
    "turns": [SYSTEM, USER, ANSWER, USER],
    "parts": [{"role": "user", "content": parts("import os")}],
    "several parts": [{"role": "user", "content": parts("import", "os", "")}],
    "strings as parts": [{"role": "user", "content": ["import", *parts("os")]}],
    "mixed": [USER, {"role": "assistant", "content": parts("a", "b")}, USER],
    "parts of the system": [{"role": "system", "content": parts("Be", "brief.")}, USER],
    "an empty content": [USER, {"role": "assistant", "content": ""}, USER],
    "no content": [USER, {"role": "assistant", "content": None}, USER],
    "no parts": [USER, {"role": "assistant", "content": []}, USER],
    "a call": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, RESULT],
    "a call and a text": [USER, {**ANSWER, "tool_calls": [CALL, CALL]}, RESULT, RESULT, ANSWER],
    "a call without arguments": [
        USER, {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "now",
        "arguments": ""}}]}, RESULT,
    ],
    "a call with broken arguments": [
        USER, {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "now",
        "arguments": "{"}}]}, RESULT,
    ],
    "a call with arguments that are no object": [
        USER, {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "now",
        "arguments": "[1]"}}]}, RESULT,
    ],
    "no calls": [USER, {**ANSWER, "tool_calls": []}, USER],
    "a result in parts": [USER, {**ANSWER, "tool_calls": [CALL]}, {**RESULT, "content":
                          parts("left", "right")}],
    "reasoning": [USER, {**ANSWER, "reasoning": "return"}],
    "reasoning under its old name": [USER, {**ANSWER, "reasoning_content": "return"}],
    "a name and unknown keys": [{**USER, "name": "me", "weight": 0, "custom": {"a": 1}}],
    "a developer": [{"role": "developer", "content": "Be brief."}, USER],
    "a developer and a system": [SYSTEM, USER, {"role": "developer", "content": "Be good."}, USER],
    "an open answer": [USER, ANSWER],
    "special tokens in a text": [{"role": "user", "content": "<|im_end|></s> [INST]"}],
}  # fmt: skip


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    """``serve(template, messages, tools)``: the token ids of a server's prompt, or its refusal."""
    from transformers import LlamaConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.exceptions import VLLMClientError
    from vllm.renderers.hf import HfRenderer
    from vllm.renderers.online_renderer import OnlineRenderer
    from vllm.tokenizers import get_tokenizer

    renderers: dict[str, OnlineRenderer] = {}

    def renderer_of(template: str) -> OnlineRenderer:
        # One folder each: vLLM remembers formats by the tokenizer's name.
        folder = tmp_path_factory.mktemp("model")
        LlamaConfig(
            architectures=["LlamaForCausalLM"],
            num_hidden_layers=2,
            hidden_size=32,
            intermediate_size=64,
            num_attention_heads=2,
            vocab_size=512,
            max_position_embeddings=4096,
        ).save_pretrained(folder)
        tokenizer_with(template).save_pretrained(folder)
        arguments = EngineArgs(model=str(folder), dtype="float32", skip_tokenizer_init=True)
        config = arguments.create_engine_config()
        return OnlineRenderer(
            config.model_config,
            HfRenderer(config, get_tokenizer(str(folder))),
            request_logger=None,
            chat_template=None,
            chat_template_content_format="auto",
        )

    def ids(template: str, messages: Any, tools: Any = None) -> list[int]:
        if template not in renderers:
            renderers[template] = renderer_of(template)
        request = ChatCompletionRequest(
            messages=copy.deepcopy(messages), tools=copy.deepcopy(tools), tool_choice="none"
        )
        try:
            _, (prompt,) = asyncio.run(renderers[template].render_chat(request))
        except VLLMClientError as error:
            raise ValueError(str(error)) from error
        return list(prompt["prompt_token_ids"])

    return ids


def refused(function: Any, *arguments: Any) -> list[int] | None:
    """Token ids, or None for a chat that the template refuses."""
    try:
        return function(*arguments)
    except ValueError:
        return None


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_has_the_tokens_that_a_server_gives_it(serve, template):
    source = TEMPLATES[template]
    tokenizer = tokenizer_with(source)
    num_rendered = 0
    for name, messages in CHATS.items():
        for tools in (None, TOOLS):
            before = json.dumps([messages, tools])
            ids = refused(chat_token_ids, tokenizer, messages, tools)
            assert json.dumps([messages, tools]) == before, "nothing of the caller's is changed"
            assert ids == refused(serve, source, messages, tools), (name, tools)
            num_rendered += ids is not None
    assert num_rendered >= len(CHATS)


def test_the_templates_differ_in_what_they_take():
    formats = {name: content_format(template) for name, template in TEMPLATES.items()}
    assert {name for name, form in formats.items() if form == "openai"} == {"macro", "parts"}


FORMATS = [
    *TEMPLATES.values(),
    "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}",
    "{% set content = messages[0].content %}{% for c in content %}{{ c }}{% endfor %}",
    "{% set rest = messages[1:] %}{% set more = rest | list %}"
    "{% for m in more %}{% for c in m['content'][:2] %}{{ c }}{% endfor %}{% endfor %}",
    "{% for c in messages[0].content %}{{ c }}{% endfor %}",
    "{% for m in messages %}{% for c in m.tool_calls %}{{ c }}{% endfor %}{% endfor %}",
    "{% for m in documents %}{% for c in m.content %}{{ c }}{% endfor %}{% endfor %}",
    "{% macro r(x) %}{% for c in x %}{{ c }}{% endfor %}{% endmacro %}"
    "{% for m in messages %}{{ r(x=m.content) }}{% endfor %}",
    "{% macro r(x, content) %}{% for c in content %}{{ c }}{% endfor %}{% endmacro %}"
    "{% for m in messages %}{{ r(m.content, 1) }}{% endfor %}",
    "{% macro r(content) %}{% for c in content %}{{ c }}{% break %}{% endfor %}{% endmacro %}"
    "{% for m in messages %}{{ r(m.content | trim) }}{% endfor %}",
    "{% for m in messages if m.content is string %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{% generation %}{% for c in m.content %}{{ c }}{% endfor %}"
    "{%- endgeneration -%}{% endfor %}",
    "{% for broken",
]


@pytest.mark.parametrize("template", FORMATS)
def test_the_form_of_contents_is_told_as_vllm_tells_it(template):
    from vllm.renderers.hf import _detect_content_format

    assert content_format(template) == _detect_content_format(template, default="string")


def test_the_form_of_vllms_own_templates_is_told_as_vllm_tells_it():
    import vllm
    from vllm.renderers.hf import _detect_content_format

    templates = [file.read_text() for file in Path(vllm.__file__).parent.rglob("*.jinja")]
    assert templates
    for template in templates:
        assert content_format(template) == _detect_content_format(template, default="string")


def test_the_prompt_of_parts_in_words():
    """What the comparisons above compare, once without vLLM."""
    tokenizer = tokenizer_with(CHATML)
    messages = [{"role": "user", "content": parts("import", "os")}]
    ids = chat_token_ids(tokenizer, messages)
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nYou are a model.<|im_end|>\n"
        "<|im_start|>user\nimport\nos<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = chat_token_ids(tokenizer_with(PARTS), messages)
    assert "user\n(1)import(2)os<" in tokenizer.decode(ids)
    assert chat_token_ids(tokenizer_with(LLAMA3), messages).count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("template", [CHATML, LLAMA3, MACRO, MARKED])
def test_nulls_of_a_table_are_not_given(template):
    """Parquet has one set of keys for all rows, and null for those that a row does not have."""
    tokenizer = tokenizer_with(template)
    null = {"name": None, "tool_calls": None, "tool_call_id": None, "reasoning": None}
    arguments = {"a": 1, "of": {"b": 2, "deep": None}, "another tool's": None}
    call = {"id": "1", "type": None, "function": {"name": "f", "arguments": arguments}}
    padded_parts = [{"type": "text", "text": "hi", "image_url": None}, None]
    padded = [
        {**null, "role": "user", "content": padded_parts},
        {**null, "role": "assistant", "content": None, "tool_calls": [call]},
        {**null, "role": "tool", "content": "3", "tool_call_id": "1"},
    ]
    arguments = {"a": 1, "of": {"b": 2}}
    call = {"id": "1", "function": {"name": "f", "arguments": arguments}}
    messages = [
        {"role": "user", "content": parts("hi")},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
    ]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    padded_tool = copy.deepcopy(tool) | {"defer_loading": None}
    padded_tool["function"] |= {"strict": None, "description": None}
    padded_tool["function"]["parameters"]["required"] = None
    assert chat_token_ids(tokenizer, padded, [padded_tool]) == chat_token_ids(
        tokenizer, messages, [tool]
    )


def test_tools_may_be_json_text():
    tokenizer = tokenizer_with(CHATML)
    expected = chat_token_ids(tokenizer, [USER], TOOLS)
    assert chat_token_ids(tokenizer, [USER], json.dumps(TOOLS)) == expected
    assert chat_token_ids(tokenizer, [USER], []) == chat_token_ids(tokenizer, [USER]) != expected


IMAGE = {"type": "image_url", "image_url": {"url": "http://x/y.png"}}


@pytest.mark.parametrize(
    ("messages", "tools", "expected"),
    [
        ([USER, {"role": "user", "content": [IMAGE]}], None,
         r"message 2: a part of the content is \{'type': 'image_url'.* Only text is served"),
        ([{"role": "user", "content": [{"text": "no type"}]}], None, "must be a text, or"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], None, "text of a part, 1"),
        ([{"role": "user", "content": {"text": "a"}}], None, "message 1: content=.* must be"),
        ([{"role": "user", "content": 3}], None, "content=3 must be a text or a list of parts"),
        ([{"content": "a"}], None, "message 1: it must be an object with role"),
        (["a"], None, "message 1: it must be an object with role"),
        ("a", None, "messages must be a list"),
        ([], None, "messages must be a list .* not empty"),
        ([{**ANSWER, "tool_calls": {"a": 1}}], None, "tool_calls=.* must be a list"),
        ([{**ANSWER, "tool_calls": ["f"]}], None, "tool call 'f' must be an object of type"),
        ([{**ANSWER, "tool_calls": [{**CALL, "type": "custom"}]}], None, "of type function"),
        ([USER], [{"name": "add", "parameters": {}}], "tool 1: .* must be an object like"),
        ([USER], {"name": "add"}, "tools=.* must be a list"),
        ([USER], "[", "tools: this is no JSON"),
        ([USER], [{"function": {"name": "f", "parameters": "x"}}], "parameters='x' must be an"),
        ([{"role": "user", "content": "\ud83d"}], None, "messages: .* half of a surrogate pair"),
    ],
)  # fmt: skip
def test_a_chat_that_is_not_served_is_refused_with_the_reason(messages, tools, expected):
    with pytest.raises(ValueError, match=expected):
        chat_token_ids(tokenizer_with(CHATML), messages, tools)


def test_what_a_template_refuses_is_its_own_reason():
    for template, messages, expected in (
        (MISTRAL, [USER, USER], r"the chat template refuses .*TemplateError: Roles must alternate"),
        (GEMMA, [SYSTEM, USER], "System role not supported"),
        ("{{ messages[7].content }}", [USER], "UndefinedError"),
        ("{{ 1 / 0 }}", [USER], "ZeroDivisionError"),
    ):
        with pytest.raises(ValueError, match=expected):
            chat_token_ids(tokenizer_with(template), messages)


def test_without_a_template_there_is_no_chat():
    tokenizer = copy.copy(tokenizer_with(PLAIN))
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="the tokenizer has no chat template. Use an instruction"):
        chat_token_ids(tokenizer, [USER])
    tokenizer.chat_template = {"rag": R1}
    with pytest.raises(ValueError, match="no default chat template"):
        chat_token_ids(tokenizer, [USER])


def test_a_template_for_tools_is_taken_when_there_are_tools():
    tokenizer = copy.copy(tokenizer_with(PLAIN))
    tokenizer.chat_template = {"default": PLAIN, "tool_use": PARTS}
    assert tokenizer.decode(chat_token_ids(tokenizer, [USER])) == "user: import os\n"
    assert "(1)import os" in tokenizer.decode(chat_token_ids(tokenizer, [USER], TOOLS))


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    """mistral_common's tokenizer, which vLLM takes for Mistral's own checkpoints."""
    data = Path(pytest.importorskip("mistral_common").__file__).parent / "data"
    folder = tmp_path_factory.mktemp("mistral")
    shutil.copy(data / "tekken_240911.json", folder / "tekken.json")
    from vllm.tokenizers.mistral import MistralTokenizer

    return MistralTokenizer.from_pretrained(str(folder))


def test_a_tokenizer_without_templates_gives_the_tokens_that_vllm_takes(mistral):
    from vllm.renderers.mistral import safe_apply_chat_template

    call = {**CALL, "id": "abcdefghi"}
    result = {**RESULT, "tool_call_id": call["id"]}
    for messages in (
        [USER],
        [SYSTEM, {**USER, "content": parts("import", "os")}, ANSWER, USER],
        [USER, {"role": "assistant", "tool_calls": [call]}, result],
    ):
        for tools in (None, [TOOLS[1] | {"function": {"name": "now", "parameters": {}}}]):
            ids = chat_token_ids(mistral, messages, tools)
            given = copy.deepcopy(messages)
            assert ids == safe_apply_chat_template(mistral, given, tools=copy.deepcopy(tools))
            assert len(ids) > 3
    with pytest.raises(ValueError, match="the chat template refuses these messages"):
        chat_token_ids(mistral, [ANSWER, ANSWER])
    with pytest.raises(ValueError, match="Only text is served"):
        chat_token_ids(mistral, [{"role": "user", "content": [IMAGE]}])
