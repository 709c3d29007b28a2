# SPDX-License-Identifier: Apache-2.0
"""Run one ``AsyncLLM`` in a process of its own: settings as JSON in, what clients saw out."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any


async def generate(engine: Any, number: int, prompt: list[int], max_tokens: int) -> dict[str, Any]:
    """What the client of one request sees: its tokens, and the error that ended them."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    seen: dict[str, Any] = {"tokens": [], "error": None}
    try:
        inputs = TokensPrompt(prompt_token_ids=prompt)
        async for output in engine.generate(inputs, params, request_id=str(number)):
            seen["tokens"] = list(output.outputs[0].token_ids)
    except Exception as error:
        seen["error"] = type(error).__name__
    return seen


async def run(request: dict[str, Any]) -> dict[str, Any]:
    from counting_worker import EXTENSION
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.reader import get_metrics_snapshot

    settings = {"worker_extension_cls": EXTENSION} | request["engine"]
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**settings))
    if (rank := request.get("die_in_draft_on_rank")) is not None:
        await engine.collective_rpc("die_in_draft", args=(rank,))
    clients = [
        generate(engine, number, prompt, request["max_tokens"])
        for number, prompt in enumerate(request["prompts"])
    ]
    seen = await asyncio.wait_for(asyncio.gather(*clients), timeout=240)
    drafts = {
        metric.labels["engine"]: metric.value
        for metric in get_metrics_snapshot()
        if metric.name == "vllm:spec_decode_num_accepted_tokens"
    }
    stats = None if engine.errored else await engine.collective_rpc("step_counts")
    engine.shutdown()
    return {"seen": seen, "accepted_by_engine": drafts, "stats": stats}


if __name__ == "__main__":
    print("RESULT " + json.dumps(asyncio.run(run(json.loads(sys.argv[1])))), flush=True)
