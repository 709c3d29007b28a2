#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The result files of docs/results.md for a real model, on a CPU that does nothing else meanwhile:
#
#   bash benchmarks/real_model.sh MODEL QUESTIONS [PART ...]
#
# MODEL is a folder of `vllm-layerskip example-model`, QUESTIONS Spec-Bench's question.jsonl. PARTs are
# names below; default: all. A part that was stopped goes on when it is called again. Then:
# python -m benchmarks.pages.write_results
set -euo pipefail
cd "$(dirname "$0")/.."
usage="usage: bash benchmarks/real_model.sh MODEL QUESTIONS [PART ...]"
model=${1:?$usage} questions=${2:?$usage}
shift 2
[ $# -gt 0 ] || set -- float32 bfloat16 temperature functions word-problems
python=python3
[ ! -x .venv/bin/python ] || python=.venv/bin/python
results=benchmarks/results/real-model
mkdir -p "$results" build
export TRITON_INTERPRET=1 HF_HUB_OFFLINE=1

adapter=$model/drafts/smollm2-e12
own="\"exit_layer\": 12, \"draft_adapter\": \"$adapter\", \"draft_vocab\": \"$adapter/draft_vocab.json\""
drafts=(
  'int4={"exit_layer": "all", "num_speculative_tokens": 4, "draft_quantization": "int4"}'
  "adapter={$own, \"num_speculative_tokens\": 4, \"draft_quantization\": \"none\"}"
  "adapter int4={$own, \"num_speculative_tokens\": 4, \"draft_quantization\": \"int4\"}"
)
modes=(plain layerskip draft-model ngram)

measure() { # NAME QUESTIONS [OPTION ...]
  local name=$1 file=$2
  shift 2
  "$python" -m benchmarks.prompts.real_prompts --model "$model" --questions "$file" --chat \
    --output "$results/$name.json" --resume --device cpu --drafts "${drafts[@]}" --modes "${modes[@]}" \
    --max-model-len 4096 --max-tokens 64 --engine-args '{"kv_cache_memory_bytes": 2000000000}' "$@"
}

for name in "$@"; do
  case $name in
    float32) # Tokens of all questions must be plain vLLM's; speeds do not count.
      measure spec-bench-float32 "$questions" --dtype float32 --batch-size 16 --repeats 1 ;;
    bfloat16)
      measure spec-bench-bfloat16-b1 "$questions" --dtype bfloat16 --num-questions 26 ;;
    temperature)
      measure spec-bench-bfloat16-b1-t0.7 "$questions" --dtype bfloat16 --num-questions 13 \
        --temperature 0.7 ;;
    functions)
      "$python" -m benchmarks.prompts.held_out_functions 38 > build/functions.jsonl
      measure functions-bfloat16-b1 build/functions.jsonl --dtype bfloat16 --num-questions 19 ;;
    word-problems)
      "$python" -m benchmarks.prompts.word_problems 56 > build/word-problems.jsonl
      measure word-problems-bfloat16-b1 build/word-problems.jsonl --dtype bfloat16 \
        --num-questions 20 ;;
    *)
      echo "unknown part $name: float32, bfloat16, temperature, functions or word-problems" >&2
      exit 2 ;;
  esac
done
