# SPDX-License-Identifier: Apache-2.0
"""Run one engine in a process of its own: settings as JSON in, tokens as JSON out."""

from __future__ import annotations

import json
import sys


def main() -> None:
    request = json.loads(sys.argv[1])
    from counting_worker import EXTENSION
    from engines import async_scheduling_as_asked
    from features import sampling_params
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.v1.executor import Executor

    if "ray" in request:
        import ray

        ray.init(**request["ray"])
    with async_scheduling_as_asked():
        llm = LLM(**{"worker_extension_cls": EXTENSION} | request["engine"])
    greedy = SamplingParams(temperature=0, max_tokens=request["max_tokens"], ignore_eos=True)
    # Named features, one a prompt, or greedy decoding for all of them.
    params = [sampling_params(feature) for feature in request.get("features", ())] or greedy
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in request["prompts"]]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    result = {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "stats": llm.collective_rpc("step_counts"),
        "executor": Executor.get_class(llm.llm_engine.vllm_config).__name__,
        "async_scheduling": llm.llm_engine.vllm_config.scheduler_config.async_scheduling,
        "metrics": {
            metric.name: metric.value
            for metric in llm.get_metrics()
            if metric.name.startswith("vllm:spec_decode") and hasattr(metric, "value")
        },
    }
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
