# SPDX-License-Identifier: Apache-2.0
"""Catch a loss on what the model does not write: a prompt, a role's header, a template's own system
prompt. And a response, or the token that closes it, without a loss."""

import copy

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from unit.chat_templates import (
    CHATML,
    GEMMA,
    LLAMA3,
    MACRO,
    MARKED,
    MARKED_IN_A_MACRO,
    MARKED_WITH_HEADER,
    MISTRAL,
    PARTS,
    PLAIN,
    QWEN3,
    R1,
    TEMPLATES,
    tokenizer_with,
)  # fmt: skip
from unit.training.training_runs import small_tokenizer
from vllm_layerskip.chats.chat import read_chat
from vllm_layerskip.errors import UserError
from vllm_layerskip.training.config import DataConfig, Source
from vllm_layerskip.training.encoder import Encoder

SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
CALL = {"function": {"name": "now", "arguments": '{"a": 1}'}, "type": "function", "id": "1"}


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **keys):
    return {"role": "assistant", "content": text, **keys}


def encode(tokenizer, record, **settings):
    data = DataConfig(train=Source(files=("x",)), **settings)
    return Encoder(tokenizer, data).encode(record, "here, line 1")


def trained(encoded):
    """The ids that are trained, in runs: one for each response."""
    runs, within = [], False
    for label in encoded.labels:
        if label != -100:
            if not within:
                runs.append([])
            runs[-1].append(label)
        within = label != -100
    return runs


def trained_texts(template, messages, **record):
    tokenizer = tokenizer_with(template)
    encoded = encode(tokenizer, {"messages": messages, **record})
    assert all(label in (-100, i) for i, label in zip(*encoded, strict=True))
    return [tokenizer.decode(ids) for ids in trained(encoded)]


# --- Prompts and responses


def test_the_loss_is_on_responses_alone(tokenizer):
    record = {"prompt": "def add(left", "response": ", right):"}
    encoded = encode(tokenizer, record)
    assert tokenizer.decode(encoded.input_ids) == "def add(left, right):</s>"
    assert [tokenizer.decode(ids) for ids in trained(encoded)] == [", right):</s>"]
    encoded = encode(tokenizer, record, loss_on="all")
    assert encoded.labels == encoded.input_ids


# --- Which tokens of a chat


CLOSED_BY = {
    "chatml": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>", "gemma": "<end_of_turn>",
    "macro": "<|im_end|>", "parts": "<|im_end|>", "r1": "</s>", "phi3": "<|end|>",
    "marked": "<|im_end|>", "marked with header": "<|im_end|>", "marked in a macro": "<|im_end|>",
}  # fmt: skip
KNOW_NO_SYSTEM = ("mistral", "gemma")


@pytest.mark.parametrize("name", CLOSED_BY)
def test_all_responses_with_their_closing_tokens_are_trained(name):
    template, end = TEMPLATES[name], CLOSED_BY[name]
    system = [] if name in KNOW_NO_SYSTEM else [SYSTEM]
    messages = [*system, user("import os"), assistant("done"), user("return"), assistant("l + r")]
    expected = [f"done{end}", f"l + r{end}"]
    if name == "parts":
        expected = [f"(1){text}" for text in expected]
    texts = trained_texts(template, messages)
    assert [text.lstrip(" ") for text in texts] == expected
    tokenizer = tokenizer_with(template)
    encoded = encode(tokenizer, {"messages": messages})
    assert (
        encoded.input_ids
        == tokenizer(read_chat(tokenizer, messages).text(), add_special_tokens=False).input_ids
    ), "nothing is added to a text that is closed"


_words = st.text(alphabet="ab <>/|{}\n:", max_size=8).map(lambda text: f"x{text}x")
_turns = st.lists(st.sampled_from(["user", "assistant", "system"]), min_size=1, max_size=6)


@pytest.mark.parametrize("name", sorted({*CLOSED_BY} - {"mistral", "parts"}))
@given(_turns, st.data())
@example(["assistant", "user", "assistant"], None)
@example(["assistant", "assistant"], None)
@example(["user", "assistant", "assistant", "user"], None)
def test_exactly_the_assistants_texts_and_what_closes_them_are_trained(name, roles, data):
    """Whichever turns a chat has: it may begin with the assistant, or have two of its turns."""
    if name == "gemma":
        roles = [role.replace("system", "user") for role in roles]
    texts = [f"x{i}" if data is None else data.draw(_words) for i in range(len(roles))]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    answers = [m["content"] + CLOSED_BY[name] for m in messages if m["role"] == "assistant"]
    found = "".join(trained_texts(TEMPLATES[name], messages))
    assert found == "".join(answers)


@pytest.mark.parametrize("template", [CHATML, QWEN3, R1, MARKED, LLAMA3, PLAIN])
def test_a_template_that_the_chat_begins_before_the_user_is_not_trained(template):
    """The template's own system prompt and the header stand before the first message."""
    (text,) = trained_texts(template, [assistant("import"), user("os")])
    for written in ("system", "model", "Today", "assistant", "start", "os", "User"):
        assert written not in text
    assert "import" in text


def test_two_turns_of_the_assistant_are_two_responses():
    texts = trained_texts(CHATML, [user("a"), assistant("import"), assistant("return")])
    assert texts == ["import<|im_end|>", "return<|im_end|>"]


def test_of_calls_the_whole_turn_is_trained_and_not_their_results():
    messages = [
        user("a"),
        assistant(None, tool_calls=[CALL]),
        {"role": "tool", "content": "Monday", "tool_call_id": "1"},
        assistant("done"),
    ]
    texts = trained_texts(CHATML, messages, tools=[TOOL])
    assert texts == [
        '\n<tool_call>\n{"name": "now", "arguments": {"a": 1}}\n</tool_call><|im_end|>'[1:],
        "done<|im_end|>",
    ]
    texts = trained_texts(LLAMA3, messages)
    assert texts == ['{"arguments": {"a": 1}, "name": "now"}<|eot_id|>', "done<|eot_id|>"]


def test_a_template_without_a_generation_prompt_shows_where_its_header_ends():
    messages = [user("a"), assistant("import os"), user("b"), assistant("return")]
    texts = trained_texts(PLAIN, messages)
    assert texts == ["import os\n", " return\n</s>"], "a token has the blank before it"
    assert [t.strip(" ") for t in trained_texts(MISTRAL, messages)] == [
        "import os</s>",
        "return</s>",
    ]


def test_a_turn_is_trained_from_its_header_if_it_does_not_show_the_generation_prompt():
    """R1's prompt ends with <think>; what is left of a turn of the past begins with its answer."""
    messages = [user("a"), assistant("<think>\nx\n</think>import"), user("b"), assistant("return")]
    assert trained_texts(R1, messages) == ["import</s>", "return</s>"]


def test_reasoning_is_trained_where_the_template_shows_it():
    messages = [user("a"), assistant("import", reasoning="return"), user("b")]
    assert trained_texts(QWEN3, messages[:2]) == ["<think>\nreturn\n</think>\n\nimport<|im_end|>"]
    # An empty one stands after the generation prompt, too, so the model has to write it.
    no_reasoning = [SYSTEM, user("a"), assistant("import")]
    assert trained_texts(QWEN3, no_reasoning) == ["<think>\n\n</think>\n\nimport<|im_end|>"]
    with pytest.raises(UserError, match="here, line 1: the chat template changes earlier messages"):
        trained_texts(QWEN3, messages)
    assert trained_texts(MARKED, messages) == ["import<|im_end|>"], "marks need no comparison"
    assert trained_texts(MARKED, messages[:2]) == ["<think>\nreturn\n</think>\n\nimport<|im_end|>"]


def test_a_closing_token_behind_a_mark_is_trained_if_it_ends_no_sequence():
    """Qwen2.5's base model closes turns with <|im_end|>, and ends with another token."""
    inside, behind = "+ '<|im_end|>' }}\n        {%- endgen", "}}\n        {%- endgen"
    template = MARKED.replace(inside, behind).replace(
        "{%- endgeneration %}", "{%- endgeneration %}{{- '<|im_end|>' }}"
    )
    assert template.count("<|im_end|>") == MARKED.count("<|im_end|>")
    assert template != MARKED
    tokenizer = copy.deepcopy(tokenizer_with(template))
    tokenizer.eos_token = "</s>"
    encoded = encode(tokenizer, {"messages": [user("a"), assistant("import"), user("b")]})
    assert [tokenizer.decode(ids) for ids in trained(encoded)] == ["import<|im_end|>"]


def test_a_mark_in_a_comment_marks_nothing():
    template = "{# use {% generation %} to mark\nresponses #}" + CHATML
    assert trained_texts(template, [user("a"), assistant("import")]) == ["import<|im_end|>"]


def test_a_chat_whose_roles_have_other_names_is_refused():
    with pytest.raises(UserError, match="no message has the role 'assistant', .* gpt, human"):
        trained_texts(CHATML, [{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}])
    assert trained_texts(CHATML, [SYSTEM, user("a")]) == [], "nothing to train, and no mistake"


@pytest.mark.parametrize("template", [MARKED_IN_A_MACRO, MARKED_WITH_HEADER, MARKED])
def test_what_a_template_marks_is_trained_without_its_header_and_with_its_end(template):
    messages = [SYSTEM, user("a"), assistant("import"), user("b"), assistant("return")]
    assert trained_texts(template, messages) == ["import<|im_end|>", "return<|im_end|>"]
    # What the template does not mark is not trained, whoever says it.
    quiet = template.replace("message.role == 'assistant' %}", "message.role == 'nobody' %}")
    assert trained_texts(quiet, messages) == []


def test_a_chat_that_ends_with_the_user_trains_no_end():
    messages = [user("a"), assistant("import"), user("b")]
    (text,) = trained_texts(PLAIN, messages)
    assert text == "import\n"
    tokenizer = tokenizer_with(PLAIN)
    encoded = encode(tokenizer, {"messages": messages})
    assert (encoded.input_ids[-1], encoded.labels[-1]) == (tokenizer.eos_token_id, -100)
    encoded = encode(tokenizer, {"messages": messages}, loss_on="all")
    assert encoded.labels == encoded.input_ids


def test_a_template_without_an_end_gets_one(tokenizer):
    """The embedded checkpoint's: texts, one after the other."""
    encoded = encode(tokenizer, {"messages": [user("import os"), assistant("done")]})
    assert tokenizer.decode(encoded.input_ids) == "<s>import os\ndone\n</s>"
    assert [tokenizer.decode(ids) for ids in trained(encoded)] == ["done\n</s>"]


def test_a_template_that_rewrites_earlier_turns_is_refused():
    messages = [user("a"), assistant("import"), user("b"), assistant("return")]
    with pytest.raises(UserError, match="here, line 1: the chat template changes earlier messages"):
        trained_texts("{{ messages | length }}" + CHATML, messages)
    encoded = encode(
        tokenizer_with("{{ messages | length }}" + CHATML), {"messages": messages}, loss_on="all"
    )
    assert encoded.labels == encoded.input_ids


# --- Chats as the server gets them


def test_parts_and_tools_are_the_text_that_a_server_makes_of_them():
    tokenizer = tokenizer_with(CHATML)
    parts = [{"type": "text", "text": "import"}, {"type": "text", "text": "os", "image": None}]
    record = {"messages": [user(parts), assistant([parts[0]])], "tools": [TOOL]}
    text = tokenizer.decode(encode(tokenizer, record).input_ids)
    assert "<|im_start|>user\nimport\nos<|im_end|>" in text
    assert (
        '# Tools\n<tools>\n{"type": "function", "function": {"name": "now", "description"' in text
    )
    assert trained_texts(CHATML, **record) == ["import<|im_end|>"]
    assert text.startswith(tokenizer.decode(_prompt_ids(tokenizer, record)))
    for template in (MACRO, PARTS, GEMMA):
        assert "import" in trained_texts(template, **{**record, "tools": None})[0]


def _prompt_ids(tokenizer, record):
    """What a server's model answers to."""
    from vllm_layerskip.chats.chat import chat_token_ids

    return chat_token_ids(tokenizer, record["messages"][:1], record["tools"])


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": [{"content": "x"}]}, "message 1: it must be an object with role"),
        ({"messages": [user([{"type": "image_url"}])]}, "Only text is served"),
        ({"messages": [user("x")], "tools": "["}, "tools: this is no JSON"),
        ({"messages": [user("\ud83d")]}, "messages: .*half of a surrogate pair"),
        ({"text": "\ud83d"}, "text: .*half of a surrogate pair"),
        ({"prompt": "a", "response": "\ud83d"}, "response: .*half of a surrogate pair"),
        ({"body": "x"}, "there is no text in 'text'"),
    ],
)
def test_a_record_that_is_no_document_is_named(record, expected):
    with pytest.raises(UserError, match=f"here, line 1: {expected}|here, line 1: .*{expected}"):
        encode(tokenizer_with(CHATML), record)


def test_a_tokenizer_without_an_end_or_a_template_is_refused(tokenizer):
    without = copy.copy(tokenizer)
    without.chat_template = None
    with pytest.raises(UserError, match="chats need a fast tokenizer with a chat template"):
        encode(without, {"messages": [user("a")]})
    without.eos_token = None
    with pytest.raises(UserError, match="model.tokenizer: it has no end-of-sequence token"):
        encode(without, {"text": "a"})
