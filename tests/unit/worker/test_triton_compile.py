# SPDX-License-Identifier: Apache-2.0
"""Catch what Triton's interpreter does not see, without a GPU: a kernel that does not compile for
sm_90, one that is compiled again for each class of batch sizes, products of float32 in TF32."""

import json
import os
import subprocess
import sys

import pytest

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")

# Without TRITON_INTERPRET vLLM hides Triton on a CPU, so the real modules are put in place
# before our kernels are defined.
COMPILE = """
import json, sys
import triton, triton.language as tl
import vllm.triton_utils
vllm.triton_utils.triton, vllm.triton_utils.tl = triton, tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import vllm_layerskip.worker.draft_inputs as inputs, vllm_layerskip.worker.exit_states as states
import vllm_layerskip.worker.model_state as model_state

modules = {"inputs": inputs, "states": states, "model_state": model_state}
for case in json.load(sys.stdin):
    kernel = getattr(modules[case["module"]], case["kernel"])
    constexprs = dict(case["constexprs"])
    signature = {
        name: "constexpr" if name in constexprs else case["types"].get(name, "i32")
        for name in kernel.arg_names
    }
    source = ASTSource(kernel, signature, constexprs)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert ".visible .entry" in compiled.asm["ptx"]
    print(case["kernel"], case["name"])
"""

# Every launch of a step, by the key with which Triton chooses a compiled variant.
VARIANTS = """
import itertools, json
from collections import defaultdict
from types import SimpleNamespace
import numpy as np
import torch
import triton, triton.language as tl
import vllm.triton_utils
vllm.triton_utils.triton, vllm.triton_utils.tl = triton, tl
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import BaseBackend
import vllm_layerskip.worker.draft_inputs as inputs, vllm_layerskip.worker.exit_states as states
import vllm_layerskip.worker.model_state as model_state

variants = defaultdict(set)

class Recorder:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        assert all(grid), "an empty grid"
        def launch(*args, **kwargs):
            values = dict(zip(self.kernel.arg_names, args)) | kwargs
            key = []
            for param in self.kernel.params:
                value = values[param.name]
                if param.is_constexpr:
                    key.append(value)
                else:
                    key.append(native_specialize_impl(
                        BaseBackend, value, param.is_const, not param.do_not_specialize,
                        not param.do_not_specialize_on_alignment))
            variants[self.kernel.__name__].add(repr(key))
        return launch

for module in (inputs, states, model_state):
    for name, kernel in list(vars(module).items()):
        if isinstance(kernel, triton.JITFunction):
            setattr(module, name, Recorder(kernel))

S, K, H, T = 256, 12, 64, 8192
device = torch.device("cpu")
buffers = SimpleNamespace(
    input_ids=torch.zeros(T, dtype=torch.int32), positions=torch.zeros(T, dtype=torch.int64),
    seq_lens=torch.zeros(S, dtype=torch.int32),
    query_start_loc=torch.zeros(S + 1, dtype=torch.int32),
)
idx_mapping, drafts = torch.zeros(S, dtype=torch.int64), torch.zeros(S, K, dtype=torch.int64)
counts = torch.zeros(S, dtype=torch.int32)
exit_states = states.ExitStates(S, K, H, torch.float32, device)
state = model_state.LayerSkipModelState.__new__(model_state.LayerSkipModelState)
state.idx_mapping, state.query_start_loc = idx_mapping.clone(), buffers.query_start_loc.clone()
state.slot_mappings = torch.zeros(1, S, dtype=torch.int64)
state.model_config, state.early_attn_groups = SimpleNamespace(max_model_len=4096), []
model_state.build_attn_metadata = lambda **kwargs: {}
model_state.build_slot_mappings_by_layer = lambda *args: {}

for num_reqs, num_drafts in itertools.product([*range(1, 36), 48, 64, 100, 128, 256], (1, 2, 12)):
    inputs.prepare_first_pass(buffers, idx_mapping, counts, counts, counts, drafts[:, :1].clone(),
                              num_reqs, 4096)
    inputs.advance(buffers, idx_mapping, drafts[:num_reqs, 0].clone(), drafts[:, num_drafts - 1],
                   num_reqs, 4096)
    hidden = torch.zeros(num_reqs * (num_drafts + 1), H)
    exit_states.store(0, idx_mapping[:num_reqs], hidden, hidden)
    exit_states.store_all(idx_mapping[:num_reqs], hidden, hidden, num_drafts)
    exit_states.gather(idx_mapping[:num_reqs], num_drafts, hidden, hidden, len(hidden))
    for for_capture, padding in itertools.product((True, False), (0, 1, 5)):
        padded = min(num_reqs + padding, S)
        batch = SimpleNamespace(
            num_scheduled_tokens=np.array([num_drafts + 1]), num_reqs=num_reqs,
            idx_mapping=idx_mapping[:num_reqs], seq_lens=counts,
            seq_lens_cpu_upper_bound=counts, is_prefilling_np=np.zeros(num_reqs, bool))
        slots = torch.zeros(1, T, dtype=torch.int64)
        state._plan_verify(batch, padded, (), slots, None, for_capture)
print(json.dumps({name: len(keys) for name, keys in variants.items()}))
"""

ROWS = {"idx_mapping_ptr": "*i64"}
INPUTS = ROWS | {"input_ids_ptr": "*i32", "positions_ptr": "*i64", "seq_lens_ptr": "*i32"}


def _case(module, kernel, types, constexprs, name="general"):
    return {
        "module": module,
        "kernel": kernel,
        "types": types,
        "constexprs": constexprs,
        "name": name,
    }


def _state_cases(kernel, names):
    for dtype in ("bf16", "fp16", "fp32"):
        types = ROWS | dict.fromkeys(names, f"*{dtype}")
        for hidden_size in (64, 4096, 8192):
            yield _case("states", kernel, types, {"BLOCK_SIZE": hidden_size}, dtype)


_COUNTS = ("num_requests", "num_queries", "num_reqs", "num_speculative_tokens")

CASES = [
    *_state_cases(
        "_store_kernel",
        ("hidden_states_out_ptr", "residual_out_ptr", "hidden_states_ptr", "residual_ptr"),
    ),
    *_state_cases(
        "_gather_kernel",
        (
            "hidden_states_out_ptr",
            "residual_out_ptr",
            "hidden_states_ptr",
            "residual_ptr",
            "last_hidden_states_ptr",
            "last_residual_ptr",
        ),
    ),
    # Integers that equal 1 become constants of the kernel.
    _case(
        "states",
        "_store_kernel",
        ROWS
        | dict.fromkeys(
            ("hidden_states_out_ptr", "residual_out_ptr", "hidden_states_ptr", "residual_ptr"),
            "*bf16",
        ),
        {"BLOCK_SIZE": 4096, "num_tokens_per_req": 1},
        "one token per request",
    ),
    *(
        _case(
            "inputs",
            "_prepare_first_pass_kernel",
            INPUTS
            | dict.fromkeys(
                ("query_start_loc_ptr", "target_seq_lens_ptr", "num_sampled_ptr"), "*i32"
            )
            | {"num_rejected_ptr": "*i32", "last_sampled_ptr": "*i64"},
            {"BLOCK_SIZE": block_size, **ones},
            f"{block_size} {sorted(ones)}",
        )
        for block_size, ones in ((1, {"num_reqs": 1, "max_num_reqs": 1}), (256, {}), (2048, {}))
    ),
    *(
        _case(
            "inputs",
            "_advance_kernel",
            INPUTS | {"sampled_ptr": "*i64", "draft_tokens_ptr": "*i64"},
            {"BLOCK_SIZE": block_size, **ones},
            f"{block_size} {sorted(ones)}",
        )
        for block_size, ones in ((1, {"num_reqs": 1}), (256, {}))
    ),
    *(
        _case(
            "model_state",
            "_prepare_plan_kernel",
            {
                "idx_mapping_out_ptr": "*i64",
                "query_start_loc_out_ptr": "*i32",
                "slot_mappings_out_ptr": "*i64",
                "idx_mapping_ptr": "*i64",
                "slot_mappings_ptr": "*i64",
            },
            {"BLOCK_SIZE": 8, "NUM_KV_CACHE_GROUPS": groups, **ones},
            f"{groups} groups {sorted(ones)}",
        )
        for groups, ones in (
            (1, {}),
            (3, {}),
            (
                1,
                dict.fromkeys(
                    ("num_requests", "num_queries", "num_reqs", "num_speculative_tokens"), 1
                ),
            ),
        )
    ),
]


# What ``tl.dot`` of float32 becomes; a script of its own, as Triton reads a kernel's source.
DOT = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

@triton.jit
def dot(x, y, out):
    row, column = tl.arange(0, 32)[:, None], tl.arange(0, 32)[None, :]
    tile = row * 32 + column
    tl.store(out + tile, tl.dot(tl.load(x + tile), tl.load(y + tile)))

source = ASTSource(dot, dict.fromkeys(("x", "y", "out"), "*fp32"), {})
print("tf32" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])
"""


@pytest.fixture
def run(tmp_path):
    """Runs code with the real Triton; ``variables`` are set, or unset where None."""

    def run(code: str, text: str = "", **variables: str | None) -> str:
        script = tmp_path / "script.py"
        script.write_text(code)
        environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)} | variables
        environment["TRITON_INTERPRET"] = None
        process = subprocess.run(
            [sys.executable, str(script)], input=text, capture_output=True, text=True, check=False,
            env={key: value for key, value in environment.items() if value is not None},
        )  # fmt: skip
        assert process.returncode == 0, process.stdout + process.stderr[-3000:]
        return process.stdout

    return run


@ON_LINUX
def test_every_kernel_compiles_for_hopper(run):
    lines = [line for line in run(COMPILE, json.dumps(CASES)).splitlines() if "_kernel" in line]
    assert len(lines) == len(CASES)


@ON_LINUX
def test_no_batch_size_compiles_a_kernel_anew(run):
    """Otherwise requests wait while Triton compiles, and vLLM's JIT monitor complains."""
    kernels = ("prepare_first_pass", "advance", "store", "gather", "prepare_plan")
    variants = json.loads(run(VARIANTS).splitlines()[-1])
    assert variants == {f"_{name}_kernel": 1 for name in kernels}


@ON_LINUX
def test_attention_of_the_float32_tests_is_no_tf32(run):
    """Triton's default rounds to ten bits, and equal tokens would be luck."""
    assert run(DOT, TRITON_F32_DEFAULT=None).strip() == "True"
    assert run(DOT).strip() == "False", "tests/conftest.py sets TRITON_F32_DEFAULT"
