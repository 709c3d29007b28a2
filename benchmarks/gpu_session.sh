#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The GPU runs of docs/benchmarks.md, in steps of less than ten minutes each, most valuable first:
#
#   bash benchmarks/gpu_session.sh 7b           # one step, or several
#   bash benchmarks/gpu_session.sh --tiny all   # every step on a CPU, as a rehearsal
#
# Results go to $RESULTS (default: layerskip-results in the temporary folder), where a later step finds them, and at
# the end of each call to $OUT if it is set. QUESTIONS names Spec-Bench's question.jsonl.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

in_order=(7b 8b k trained trained-peers 1b serve 7b-long 13b)
results=${RESULTS:-${TMPDIR:-/tmp}/layerskip-results}
python=${PYTHON:-python3}
tiny=
if [ "${1:-}" = --tiny ]; then
  tiny=1
  shift
fi
steps=("$@")
if [ ${#steps[@]} = 0 ]; then
  sed -n '3,9p' "$0"
  echo "Steps: ${in_order[*]}"
  exit 2
fi
[ "${steps[0]}" != all ] || steps=("${in_order[@]}")
mkdir -p "$results"

deliver() {
  [ -n "${OUT:-}" ] || return 0
  cp "$results"/*.json "$OUT"/
  tar -czf "$OUT/logs.tar.gz" -C "$results" --exclude='*.json' --exclude='*.safetensors' .
}
trap deliver EXIT
trap 'exit 143' TERM

status=0
try() {
  "$@" || {
    echo "FAILED ($?): $*" >&2
    status=1
  }
}

# compare FILE SECONDS PRESET ARGUMENT...: adds to FILE; in a rehearsal every preset is the tiny one.
compare() {
  local file=$results/$1.json seconds=$2 preset=$3
  shift 3
  if [ -n "$tiny" ]; then
    set -- "$@" --device cpu --tiny --preset tiny --batch-sizes 1 2 --prompt-lens 16
  else
    set -- "$@" --preset "$preset"
  fi
  try "$python" benchmarks/compare.py --output "$file" --resume --time-limit "$seconds" "$@"
}

batches=(--batch-sizes 1 4 16 32 64 128)
other_k=(6 3)
schedule='[[1, 8, 12], [9, 32, 6], [33, 127, 3], [128, 128, 0]]'
model=$results/layerskip-model
training=(--size 160m --minutes 4.5)
model_load=("${batches[@]}")
serving=(--preset 7b-cnndm)
if [ -n "$tiny" ]; then
  other_k=(2)
  schedule='[[1, 1, 4], [2, 2, 0]]'
  training=(--size tiny --minutes 1 --corpus-mb 1 --packages)
  model_load=(--device cpu --tiny)
  serving=(--device cpu --tiny --model vllm_layerskip/checkpoint --concurrency 1 2
    --max-prompt-tokens 128 --min-requests 2 --requests-per-slot 1)
fi

for step in "${steps[@]}"; do
  echo "== $step, $(date +%T)"
  case $step in
    7b) # The paper's setting: speed-up, its limit, what reuse saves, draft_model as a peer.
      compare 7b 540 7b-cnndm "${batches[@]}" \
        --modes plain layerskip draft-model layerskip-no-reuse ;;
    8b) # EAGLE-3's model, with and without a draft vocabulary.
      compare 8b 400 8b-vocab32k "${batches[@]}" --modes plain layerskip
      compare 8b 140 8b "${batches[@]}" --modes layerskip ;;
    k) # The best K of a large batch; a schedule, whose 0 at batch 128 must cost what plain costs.
      compare 7b 360 7b-cnndm --batch-sizes 16 32 64 128 --modes layerskip \
        --num-speculative-tokens "${other_k[@]}"
      compare 7b 180 7b-cnndm "${batches[@]}" --modes layerskip --schedule "$schedule" ;;
    trained) # Real acceptance, held-out prompts.
      try "$python" benchmarks/train_model.py "${training[@]}" --output "$model"
      cp "$model/scores.json" "$results/trained-scores.json"
      try "$python" benchmarks/compare.py --model "$model" "${model_load[@]}" --resume \
        --output "$results/trained.json" --time-limit 270 --modes plain layerskip draft-model ;;
    trained-peers) # The same checkpoint; needs the step before it on the same machine.
      try "$python" benchmarks/compare.py --model "$model" "${model_load[@]}" --resume \
        --output "$results/trained.json" --time-limit 300 \
        --modes transformers transformers-assistant ngram early-exit layerskip-no-reuse ;;
    1b) # A small model; every start with empty caches, so that starts compare.
      compare 1b 420 1b "${batches[@]}" --fresh-cache --modes plain layerskip ;;
    serve) # vllm bench serve with Spec-Bench.
      if [ -z "${QUESTIONS:-}" ]; then
        echo "serve: set QUESTIONS to Spec-Bench's question.jsonl." >&2
        status=1
        continue
      fi
      try "$python" benchmarks/serve_bench.py --questions "$QUESTIONS" "${serving[@]}" --resume \
        --output "$results/serve.json" --time-limit 420 --modes plain layerskip ;;
    7b-long) # Long prompts: the KV cache's share of the bytes.
      compare 7b 420 7b-cnndm "${batches[@]}" --prompt-lens 2000 --modes plain layerskip ;;
    13b)
      compare 13b 420 13b-cnndm --batch-sizes 1 4 16 32 --modes plain layerskip ;;
    *)
      echo "No step called $step. Steps: ${in_order[*]}" >&2
      exit 2 ;;
  esac
done
for file in "$results"/*.json; do
  [[ $file = *-scores.json ]] || try "$python" benchmarks/report.py "$file"
done
exit $status
