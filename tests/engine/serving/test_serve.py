# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` with LayerSkip, as a user starts it and clients talk to it.

One server; what it must answer comes from plain vLLM in the test process. Catches parameters
that are lost or misread with drafts, a stop that is seen too late inside of accepted drafts,
and requests that are lost, mixed up or kept running when many clients come and go.
"""

from __future__ import annotations

import itertools
import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from servers import MODEL_NAME, Server
from vllm import SamplingParams
from vllm.inputs import TokensPrompt
from vllm.sampling_params import StructuredOutputsParams

FLAGS = [
    *("--speculative-model", "[self]", "--num-speculative-tokens", "5", "--exit-layer", "3"),
    # Or a small model fills its answer with spaces, which JSON allows.
    *("--structured-outputs-config", '{"backend":"xgrammar","disable_any_whitespace":true}'),
]


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    server = Server(checkpoint, FLAGS, tmp_path_factory.mktemp("serve") / "log")
    yield server
    server.close()


@pytest.fixture(scope="module")
def plain(pool, checkpoint):
    return pool.get(checkpoint, max_num_seqs=16)


@pytest.fixture
def speculates(server):
    """The server drafts for the test's requests, and drafts are accepted."""
    before = server.counter("num_accepted_tokens_total")
    yield
    assert server.counter("num_accepted_tokens_total") > before


def plain_answers(plain, prompts, params):
    inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    return plain.llm.generate(inputs, params, use_tqdm=False)


def plain_choice(plain, prompt, **params):
    params = SamplingParams(**{"temperature": 0, **params})
    return plain_answers(plain, [prompt], params)[0].outputs[0]


def assert_same_choice(choice, expected):
    assert choice["token_ids"] == list(expected.token_ids)
    assert choice["text"] == expected.text
    assert choice["finish_reason"] == expected.finish_reason
    assert choice["stop_reason"] == expected.stop_reason


PARAMETERS = {
    "none": {},
    "presence_penalty": {"presence_penalty": 1.5},
    "frequency_penalty": {"frequency_penalty": 1.0},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "stop_string": {"stop": ["The", " of"]},
    "stop_token_ids": {"stop_token_ids": list(range(260, 290))},
    "min_tokens": {"stop_token_ids": list(range(260, 290)), "min_tokens": 20},
    "bad_words": {"bad_words": [".", "The"]},
    "allowed_token_ids": {"allowed_token_ids": list(range(20, 200))},
    "structured_outputs": {"structured_outputs": {"regex": r"def [a-z_]{3,12}\(self\):"}},
    "ignore_eos": {"ignore_eos": True, "max_tokens": 50},
}


@pytest.fixture(scope="module")
def answers(server, prompts):
    """Every request of ``PARAMETERS``, streamed and whole, all at once."""
    requests = [{"prompt": prompts[0], "max_tokens": 40, **body} for body in PARAMETERS.values()]
    before = server.counter("num_accepted_tokens_total")
    streamed = server.complete_all(requests)
    with ThreadPoolExecutor(len(requests)) as clients:
        whole = list(clients.map(lambda body: server.complete(**body)["choices"][0], requests))
    assert server.counter("num_accepted_tokens_total") > before
    return dict(zip(PARAMETERS, zip(streamed, whole, strict=True), strict=True))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_give_plain_vllms_answer(answers, plain, prompts, name):
    params = {"max_tokens": 40, **PARAMETERS[name]}
    if "structured_outputs" in params:
        params["structured_outputs"] = StructuredOutputsParams(**params["structured_outputs"])
    expected = plain_choice(plain, prompts[0], **params)
    streamed, whole = answers[name]
    assert_same_choice(streamed, expected)
    assert_same_choice(whole, expected)
    assert streamed["num_chunks"] > 1, "the answer did not stream"
    if name != "none":
        assert whole["token_ids"] != answers["none"][1]["token_ids"], "it changed nothing"


@pytest.mark.usefixtures("speculates")
def test_stops_anywhere_in_an_answer(server, plain, prompts):
    """Every token of an answer stops it once, so most stops lie inside of accepted drafts."""
    answer = plain_choice(plain, prompts[0], max_tokens=30)
    firsts = {token: position for position, token in reversed(list(enumerate(answer.token_ids)))}
    assert len(firsts) > 10
    requests = [
        {"prompt": prompts[0], "max_tokens": 30, "stop_token_ids": [token]} for token in firsts
    ]
    for choice, (token, position) in zip(
        server.complete_all(requests), firsts.items(), strict=True
    ):
        assert choice["token_ids"] == list(answer.token_ids[: position + 1])
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", token)
    texts = [answer.text[start : start + 3] for start in range(4, len(answer.text) - 3, 6)]
    requests = [{"prompt": prompts[0], "max_tokens": 30, "stop": [text]} for text in texts]
    for choice, text in zip(server.complete_all(requests), texts, strict=True):
        assert choice["text"] == answer.text[: answer.text.index(text)]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", text)


@pytest.mark.usefixtures("speculates")
def test_several_choices(server, plain, prompts):
    answer = server.complete(prompts[0], max_tokens=24, n=3, temperature=0.7, top_k=1)
    expected = list(plain_choice(plain, prompts[0], max_tokens=24).token_ids)
    assert [choice["token_ids"] for choice in answer["choices"]] == [expected] * 3
    assert answer["usage"]["completion_tokens"] == 3 * 24


@pytest.mark.usefixtures("speculates")
def test_seeds_can_be_repeated(server, prompts):
    def sampled(seed):
        answer = server.complete(
            prompts[0], max_tokens=24, n=2, temperature=0.9, top_p=0.95, seed=seed, ignore_eos=True
        )
        return [choice["token_ids"] for choice in answer["choices"]]

    first, again, other = sampled(1), sampled(1), sampled(2)
    assert first == again
    assert first != other
    assert first[0] != first[1]
    assert [len(tokens) for tokens in first] == [24, 24]


@pytest.mark.usefixtures("speculates")
def test_logprobs_and_echo(server, plain):
    text = "import os\nimport sys\n\n\ndef main("
    params = SamplingParams(temperature=0, max_tokens=30, logprobs=4, prompt_logprobs=2)
    (request,) = plain.llm.generate([text], params, use_tqdm=False)
    expected = request.outputs[0]
    body = {"max_tokens": 30, "return_tokens_as_token_ids": True}
    (choice,) = server.complete(text, logprobs=4, prompt_logprobs=2, **body)["choices"]
    assert choice["token_ids"] == list(expected.token_ids)
    reported = choice["logprobs"]
    assert reported["tokens"] == [f"token_id:{token}" for token in expected.token_ids]
    chosen = [
        step[token].logprob
        for step, token in zip(expected.logprobs, expected.token_ids, strict=True)
    ]
    assert reported["token_logprobs"] == pytest.approx(chosen, abs=1e-4)
    for reported_step, step in zip(reported["top_logprobs"], expected.logprobs, strict=True):
        assert reported_step == pytest.approx(
            {f"token_id:{token}": entry.logprob for token, entry in step.items()}, abs=1e-4
        )
    assert choice["prompt_logprobs"][0] is None
    for reported_step, step in zip(
        choice["prompt_logprobs"][1:], request.prompt_logprobs[1:], strict=True
    ):
        assert {int(token): entry["rank"] for token, entry in reported_step.items()} == {
            token: entry.rank for token, entry in step.items()
        }
        assert {
            int(token): entry["logprob"] for token, entry in reported_step.items()
        } == pytest.approx({token: entry.logprob for token, entry in step.items()}, abs=1e-4)

    body["return_token_ids"] = False  # vLLM does not echo text beside token ids.
    (echoed,) = server.complete(text, echo=True, logprobs=1, **body)["choices"]
    assert echoed["text"] == text + expected.text
    num_prompt_tokens = len(request.prompt_token_ids)
    assert echoed["logprobs"]["tokens"] == [
        f"token_id:{token}" for token in [*request.prompt_token_ids, *expected.token_ids]
    ]
    assert echoed["logprobs"]["token_logprobs"][num_prompt_tokens:] == pytest.approx(
        chosen, abs=1e-4
    )


@pytest.mark.usefixtures("speculates")
@pytest.mark.parametrize("logprobs", [2, 3])
def test_logprobs_of_named_token_ids(server, plain, prompts, logprobs):
    token_ids = [5, 20, 30]
    expected = plain_choice(plain, prompts[0], max_tokens=14, logprob_token_ids=token_ids)
    body = {
        "logprobs": logprobs,
        "logprob_token_ids": token_ids,
        "max_tokens": 14,
        "return_tokens_as_token_ids": True,
    }
    (whole,) = server.complete(prompts[0], **body)["choices"]
    request = Server._completion(prompts[0], body)
    chunks = server.stream("/v1/completions", request)
    streamed = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    wanted = [
        {f"token_id:{token}": entry.logprob for token, entry in step.items()}
        for step in expected.logprobs
    ]
    for steps in (
        whole["logprobs"]["top_logprobs"],
        [step for choice in streamed for step in choice["logprobs"]["top_logprobs"]],
    ):
        assert len(steps) == len(expected.token_ids)
        for step, wanted_step in zip(steps, wanted, strict=True):
            # The server names the chosen token and then as many as `logprobs` says.
            assert len(step) >= logprobs
            assert step == pytest.approx({token: wanted_step[token] for token in step}, abs=1e-4)
    assert whole["token_ids"] == list(expected.token_ids)


@pytest.mark.usefixtures("speculates")
def test_chat_streams_plain_vllms_answer(server, plain):
    content = "import os\nimport sys\n\n\ndef main("
    messages = [{"role": "user", "content": content}]
    params = SamplingParams(temperature=0, max_tokens=32)
    expected = plain.llm.chat(messages, params, use_tqdm=False)[0].outputs[0].text
    assert len(expected) > 10
    assert server.chat(content, max_tokens=32)["choices"][0]["message"]["content"] == expected
    chunks = server.stream(
        "/v1/chat/completions",
        {"model": MODEL_NAME, "messages": messages, "max_tokens": 32, "temperature": 0},
    )
    deltas = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
    assert "".join(deltas) == expected
    assert sum(bool(delta) for delta in deltas) > 1


@pytest.mark.usefixtures("speculates")
def test_chat_answers_in_a_json_schema(server):
    schema = {
        "type": "object",
        "properties": {
            "import": {"enum": ["import os", "import sys", "from os import path"]},
            "lines": {"type": "integer", "minimum": 0, "maximum": 999},
        },
        "required": ["import", "lines"],
        "additionalProperties": False,
    }
    answer = server.chat(
        "import os\n",
        max_tokens=120,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "module", "schema": schema, "strict": True},
        },
    )
    parsed = json.loads(answer["choices"][0]["message"]["content"])
    assert parsed["import"] in schema["properties"]["import"]["enum"]
    assert 0 <= parsed["lines"] <= 999


@pytest.mark.parametrize("parameter", [{"min_p": 0.1}, {"logit_bias": {"5": 1.0}}])
def test_parameters_that_vllm_refuses_with_speculation(server, prompts, parameter):
    body = {"model": MODEL_NAME, "prompt": prompts[0], "temperature": 0.5, **parameter}
    status, message = server.refusal("/v1/completions", body)
    assert status == 400
    assert "not yet supported with speculative decoding" in message


def test_closed_connections_end_their_requests(server, plain, prompts):
    """The engine stops working on them, and goes on for everybody else."""
    before = server.metric("vllm:generation_tokens_total")
    for prompt in prompts[:4]:
        server.abandon(prompt, num_chunks=3, max_tokens=110, ignore_eos=True)
    server.wait_until_idle(timeout_s=20)
    assert server.metric("vllm:generation_tokens_total") - before < 4 * 110
    choice = server.complete(prompts[0], max_tokens=40)["choices"][0]
    assert_same_choice(choice, plain_choice(plain, prompts[0], max_tokens=40))


MIXED_PARAMETERS = [
    {},
    {"repetition_penalty": 1.2},
    {"stop": ["return"]},
    {"presence_penalty": 0.8, "frequency_penalty": 0.3},
    {"min_tokens": 12, "stop_token_ids": list(range(260, 330))},
    {"bad_words": ["self"]},
    {"temperature": 0.8, "top_k": 1},
    {"allowed_token_ids": list(range(10, 400))},
]


@pytest.mark.usefixtures("speculates")
def test_a_hundred_streams_at_once(server, plain, prompts):
    """More clients than the engine has places and K/V for; some of them leave early."""
    num_streams = 100
    source = list(itertools.chain(*prompts))
    requests = []
    for index in range(num_streams):
        start, length = 3 * index, 2 + (7 * index) % 60
        requests.append(
            {
                "prompt": [0, *source[start : start + length]],
                "max_tokens": 12 + (5 * index) % 28,
                **MIXED_PARAMETERS[index % len(MIXED_PARAMETERS)],
            }
        )
    params = [
        SamplingParams(
            **{"temperature": 0} | {key: value for key, value in body.items() if key != "prompt"}
        )
        for body in requests
    ]
    expected = plain_answers(plain, [body["prompt"] for body in requests], params)
    succeeded = server.metric("vllm:request_success_total")
    choices = server.complete_all(requests)
    assert len(choices) == num_streams
    for choice, answer in zip(choices, expected, strict=True):
        assert_same_choice(choice, answer.outputs[0])
    server.wait_until_idle()
    assert server.metric("vllm:request_success_total") - succeeded == num_streams
    assert server.process.poll() is None
    assert_same_choice(server.complete_streaming(**requests[0]), expected[0].outputs[0])


def test_metrics_show_vllms_own_counters(server):
    before = server.counter("num_drafts_total")
    server.complete("class A:\n    def __init__(self):\n", max_tokens=40, ignore_eos=True)
    assert server.counter("num_drafts_total") > before
    accepted = server.counter("num_accepted_tokens_total")
    assert 0 < accepted <= server.counter("num_draft_tokens_total")
    assert server.counter("num_accepted_tokens_per_pos_total") == accepted


def test_log_says_what_runs(server):
    lines = [line for line in server.log.read_text().splitlines() if "LayerSkip 0." in line]
    assert len(lines) == 1
    assert "exit_layer 3" in lines[0]
    assert "INFO" in lines[0]
    assert "5 speculative tokens" in lines[0]


def test_nothing_went_wrong_unseen(server):
    """After all of the above (tests of a file run in order)."""
    assert not re.findall(r"^.*\b(?:ERROR|Traceback)\b.*$", server.log.read_text(), re.M)


def test_bad_flags_end_the_start_before_weights_are_loaded(checkpoint, tmp_path):
    """Seen by the user, not only by a unit test: exit status, message, and no weights read."""
    log = tmp_path / "log"
    with pytest.raises(AssertionError) as error:
        Server(
            checkpoint, ["--spec-model", "[self]", "--spec-tokens", "5", "--exit-layer", "12"], log
        )
    text = str(error.value)
    assert "exit_layer=12 must be an integer from 1 to 11" in text
    assert "Loading weights" not in log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--spec-model", "[self]", "--spec-tokens", "5", "--exit-layer", "3"],
        [
            "--speculative-config",
            '{"method": "layerskip", "exit_layer": 3, "num_speculative_tokens": 5}',
        ],
    ],
    ids=["short", "json"],
)
def test_the_other_spellings(checkpoint, plain, prompts, tmp_path, flags):
    """The default run has unit/config/test_cli_args.py: all three give one engine config."""
    server = Server(checkpoint, flags, tmp_path / "log")
    try:
        choice = server.complete(prompts[0], max_tokens=40)["choices"][0]
        assert_same_choice(choice, plain_choice(plain, prompts[0], max_tokens=40))
        assert server.counter("num_accepted_tokens_total") > 0
    finally:
        server.close()
