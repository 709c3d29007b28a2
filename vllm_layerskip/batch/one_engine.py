# SPDX-License-Identifier: Apache-2.0
"""Answers from one engine in this process (or, with tensor parallelism, from its workers)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from vllm_layerskip.batch.output import Answer
from vllm_layerskip.batch.rows import PromptRow
from vllm_layerskip.batch.settings import JobSettings
from vllm_layerskip.chats.chat import chat_token_ids
from vllm_layerskip.host.engine_start import Given, start_engine

OWN_OPTIONS = (
    "exit_layer",
    "num_speculative_tokens",
    "draft_quantization",
    "draft_adapter",
    "dtype",
    "max_model_len",
    "tensor_parallel_size",
)
"""Settings with an option of their own, which has their name."""


def answers(rows: Iterable[PromptRow], settings: JobSettings) -> Iterator[Answer]:
    """Generate for all rows; answers come in the order in which they end.

    The engine always has twice as many requests as it runs at once, so that no place is empty while
    there are rows, and no more than these are in memory.

    Raises:
        UserError: the engine cannot start with these settings.
    """
    llm = start_engine(given_arguments(settings))
    engine = llm.llm_engine
    max_pending = 2 * engine.vllm_config.scheduler_config.max_num_seqs
    waiting, num_pending = iter(rows), 0
    while True:
        while num_pending < max_pending and (row := next(waiting, None)) is not None:
            refusal = _add(llm, row)
            if refusal is None:
                num_pending += 1
            else:
                yield refusal
        if num_pending == 0:
            break
        for output in engine.step():
            if output.finished:
                num_pending -= 1
                yield _answer(output)
    engine.engine_core.shutdown()


def engine_arguments(settings: JobSettings) -> dict[str, Any]:
    """Arguments of vLLM's ``LLM``."""
    arguments = {"model": settings.model, **settings.engine_args}
    if settings.speculative_config is not None:
        arguments["speculative_config"] = dict(settings.speculative_config)
        arguments.setdefault("per_request_spec_decode_metrics", "summary")
    return arguments


def given_arguments(settings: JobSettings) -> Given:
    """Arguments of vLLM's ``LLM``, with the options that they came from."""
    asked = {**(settings.speculative_config or {}), **settings.engine_args}
    options = {
        name: f"--{name.replace('_', '-')} {asked[name]}" for name in OWN_OPTIONS if name in asked
    }
    further = {name: v for name, v in settings.engine_args.items() if name not in OWN_OPTIONS}
    return Given(engine_arguments(settings), options, further)


def prompt_of(row: PromptRow, tokenizer: Any) -> Any:
    """The row's prompt, as vLLM takes it.

    Raises:
        ValueError: there is no chat template, or it refuses the chat.
    """
    from vllm.inputs import TextPrompt, TokensPrompt

    if row.messages is not None:
        return TokensPrompt(prompt_token_ids=chat_token_ids(tokenizer, row.messages, row.tools))
    if row.prompt_token_ids is not None:
        return TokensPrompt(prompt_token_ids=list(row.prompt_token_ids))
    return TextPrompt(prompt=row.prompt)


def _add(llm: Any, row: PromptRow) -> Answer | None:
    """Give a row to the engine.

    Returns:
        None, or an answer with vLLM's error if it cannot serve the row (the prompt is too long...).
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        prompt = prompt_of(row, None if row.messages is None else llm.get_tokenizer())
        params = SamplingParams(**row.sampling_params, output_kind=RequestOutputKind.FINAL_ONLY)
        llm.llm_engine.add_request(str(row.index), prompt, params)
    except EngineDeadError:
        raise
    except Exception as error:
        # Tokenizers, templates and vLLM's checks fail on odd rows in many ways, and a row must not
        # cost the others their answers.
        return Answer(row.index, error=f"{type(error).__name__}: {error}")
    return None


def _answer(output: Any) -> Answer:
    (completion,) = output.outputs
    if completion.finish_reason == "error":
        error = "vLLM could not serve the request; its log says why."
        return Answer(int(output.request_id), error=error)
    drafting = getattr(completion, "spec_decode_metrics", None)
    histogram = [] if drafting is None else drafting.histogram
    return Answer(
        index=int(output.request_id),
        text=completion.text,
        token_ids=tuple(completion.token_ids),
        finish_reason=completion.finish_reason,
        num_prompt_tokens=len(output.prompt_token_ids),
        num_drafts=None if drafting is None else sum(histogram),
        num_accepted_tokens=(
            None if drafting is None else sum(j * count for j, count in enumerate(histogram))
        ),
    )
