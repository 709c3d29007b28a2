# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` set up everything they need in .venv on a fresh machine.

PYTHON ?= python3
VENV ?= .venv

# The demo runs on a GPU where there is one. The tests run on vLLM's CPU build everywhere, with
# Triton's interpreter in place of a GPU; it must not be set for the demo on a GPU.
GPU := $(shell nvidia-smi --list-gpus 2>/dev/null | head -n 1)
CPU_VENV := $(if $(GPU),$(VENV)-cpu,$(VENV))
CPU_STAMP := $(CPU_VENV)/.installed-cpu
GPU_STAMP := $(VENV)/.installed-gpu
DEMO_STAMP := $(if $(GPU),$(GPU_STAMP),$(CPU_STAMP))

.PHONY: demo test quality style checkpoint check-vllm clean

# What pip and vLLM write goes to a log; the terminal has a line for each phase, and the answers.
DEMO_LOG := $(VENV)/demo.log

demo:
	@$(PYTHON) tools/run_logged.py $(DEMO_LOG) "Setting up $(VENV) (log: $(DEMO_LOG))" \
		$(MAKE) --no-print-directory $(DEMO_STAMP)
	@$(if $(GPU),,TRITON_INTERPRET=1) $(VENV)/bin/python examples/demo.py --log $(DEMO_LOG)

# Two processes: an engine of the tests keeps one core busy, with Python and the interpreter.
# tests/conftest.py has the order of the files.
test: $(CPU_STAMP)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(CPU_VENV)/bin/python -m pytest -n 2 --dist loadfile \
		--no-loadscope-reorder

quality: $(CPU_STAMP)
	$(CPU_VENV)/bin/ruff check .
	$(CPU_VENV)/bin/ruff format --check .
	$(CPU_VENV)/bin/mypy

style: $(CPU_STAMP)
	$(CPU_VENV)/bin/ruff check --fix .
	$(CPU_VENV)/bin/ruff format .

# Train the embedded checkpoint and its twin again (about an hour on 2 cores).
checkpoint: $(DEMO_STAMP)
	$(VENV)/bin/python -m vllm_layerskip.training --output vllm_layerskip/checkpoint --twin

# Record again what the plugin touches in each supported vLLM (docs/compatibility.md); downloads
# the wheel of the one that is not installed.
CONTACTS := tests/unit/tools/data/vllm-
check-vllm: $(CPU_STAMP)
	$(CPU_VENV)/bin/python tools/check_vllm.py --installed --record $(CONTACTS)0.32.0-contacts.json
	$(CPU_VENV)/bin/python tools/check_vllm.py 0.33.0 --record $(CONTACTS)0.33.0-contacts.json

define make_venv
$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or later is needed"'
test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
$(1)/bin/python -m pip install --quiet --upgrade pip
endef

$(CPU_STAMP): pyproject.toml tools/install_cpu.py
	$(call make_venv,$(CPU_VENV))
	$(CPU_VENV)/bin/python tools/install_cpu.py
	$(CPU_VENV)/bin/python -m pip install --quiet --editable '.[train,dev]'
	touch $@

$(GPU_STAMP): pyproject.toml
	$(call make_venv,$(VENV))
	$(VENV)/bin/python -m pip install --quiet --editable '.[gpu,train,dev]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-cpu .pytest_cache .ruff_cache .mypy_cache
