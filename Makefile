# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` set up everything they need in .venv on a fresh machine.

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

# Triton's interpreter stands in for a GPU; on a GPU it must not be set.
GPU := $(shell nvidia-smi --list-gpus 2>/dev/null | head -n 1)
ifeq ($(GPU),)
export TRITON_INTERPRET := 1
endif

.PHONY: demo test quality style checkpoint clean

demo: $(STAMP)
	$(PY) examples/demo.py

test: $(STAMP)
	$(PY) -m pytest

quality: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

style: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# Train the embedded checkpoint and its twin again (about an hour on 2 cores).
checkpoint: $(STAMP)
	$(PY) -m vllm_layerskip.training --output vllm_layerskip/checkpoint --twin

$(STAMP): pyproject.toml tools/install_cpu.py
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or later is needed"'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
ifeq ($(GPU),)
	$(PY) tools/install_cpu.py
	$(PY) -m pip install --quiet --editable '.[train,dev]'
else
	$(PY) -m pip install --quiet --editable '.[gpu,train,dev]'
endif
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
