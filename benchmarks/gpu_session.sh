#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The GPU runs of docs/benchmarks.md; --help says which, and what the variables mean.
#
#   bash benchmarks/gpu_session.sh first          # the first command of a GPU lease
#   bash benchmarks/gpu_session.sh --tiny first   # a rehearsal on a CPU
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
python=python3
[ ! -x "$root/.venv/bin/python" ] || python=$root/.venv/bin/python
exec "${PYTHON:-$python}" -m benchmarks.gpu.gpu_session "$@"
