# SPDX-License-Identifier: Apache-2.0
"""Catch a kernel that only Triton's interpreter takes: each compiles for sm_90, without a GPU."""

import json
import os
import subprocess
import sys

import pytest

# Without TRITON_INTERPRET vLLM hides Triton on a CPU, so the real modules are put in place
# before our kernels are defined.
COMPILE = """
import json, sys
import triton, triton.language as tl
import vllm.triton_utils
vllm.triton_utils.triton, vllm.triton_utils.tl = triton, tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import vllm_layerskip.draft_inputs as inputs, vllm_layerskip.exit_states as states
import vllm_layerskip.model_state as model_state

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
            (1, {"num_requests": 1, "num_queries": 1, "num_reqs": 1, "num_drafts": 1}),
        )
    ),
]


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")
def test_every_kernel_compiles_for_hopper(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    process = subprocess.run(
        [sys.executable, "-c", COMPILE],
        input=json.dumps(CASES),
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert process.returncode == 0, process.stdout + process.stderr[-3000:]
    lines = [line for line in process.stdout.splitlines() if "_kernel" in line]
    assert len(lines) == len(CASES)
