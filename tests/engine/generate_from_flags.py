# SPDX-License-Identifier: Apache-2.0
"""Run one engine in a process of its own: flags of `vllm serve` in, prompts and tokens as JSON."""

from __future__ import annotations

import json
import sys


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.inputs import TokensPrompt
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    load_general_plugins()  # As AsyncEngineArgs does before it adds its flags.
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    engine_args = EngineArgs.from_cli_args(parser.parse_args(sys.argv[3:]))
    llm = LLM.from_engine_args(engine_args)
    params = SamplingParams(temperature=0, max_tokens=int(sys.argv[2]), ignore_eos=True)
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in json.loads(sys.argv[1])]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    print("RESULT " + json.dumps([list(output.outputs[0].token_ids) for output in outputs]))


if __name__ == "__main__":
    main()
