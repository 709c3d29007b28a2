#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The GPU runs of docs/benchmarks.md: gpu/gpu_session.py says which, and what the variables mean.
#
#   bash benchmarks/gpu_session.sh first          # the first command of a GPU lease
#   bash benchmarks/gpu_session.sh --tiny first   # the same path on a CPU, as a rehearsal
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
python=python3
[ ! -x "$root/.venv/bin/python" ] || python=$root/.venv/bin/python
exec "${PYTHON:-$python}" -m benchmarks.gpu.gpu_session "$@"
