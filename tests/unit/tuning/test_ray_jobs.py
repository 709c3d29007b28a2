# SPDX-License-Identifier: Apache-2.0
"""Catch cells of different machines that are compared with each other."""

from __future__ import annotations

import pytest

from vllm_layerskip.errors import UserError
from vllm_layerskip.tuning.ray_jobs import RayNodes, check_facts, one_type

H100 = {"GPU": 8, "CPU": 16, "accelerator_type:H100": 1}
A100 = {"GPU": 8, "CPU": 16, "accelerator_type:A100": 1}


@pytest.mark.parametrize(
    ("nodes", "wanted", "found"),
    [
        ([H100, H100], None, "H100"),
        ([H100, A100], "A100", "A100"),
        # Ray does not know every GPU by name; what tasks report is compared all the same.
        ([{"GPU": 1}], None, None),
    ],
)
def test_one_type_of_gpus(nodes, wanted, found):
    assert one_type(nodes, wanted) == found


@pytest.mark.parametrize(
    ("nodes", "wanted", "error"),
    [
        ([H100, A100], None, "has A100, H100, and times of different GPUs cannot be compared"),
        ([H100], "L4", "--accelerator-type L4: the cluster has H100"),
        ([], None, "the cluster has no GPUs"),
    ],
)
def test_no_choice_among_types_is_made_silently(nodes, wanted, error):
    with pytest.raises(UserError, match=error):
        one_type(nodes, wanted)


FACTS = {"machine": "NVIDIA H100", "versions": {"vllm": "0.32.0"}, "code": "abc"}


@pytest.mark.parametrize(
    ("name", "value"),
    [("machine", "NVIDIA A100"), ("versions", {"vllm": "0.33.0"}), ("code", "def")],
)
def test_a_row_of_another_machine_or_version_is_refused(name, value):
    check_facts(FACTS, FACTS, "E=8 K=4")
    with pytest.raises(UserError, match=rf"E=8 K=4 ran with {name} .*cannot be compared"):
        check_facts({**FACTS, name: value}, FACTS, "E=8 K=4")


def test_a_task_has_the_gpus_of_its_engine_and_a_process_of_its_own():
    options = RayNodes("cuda", "NVIDIA H100", "H100").task_options(4)
    assert (options["num_gpus"], options["accelerator_type"]) == (4, "H100")
    assert options["max_calls"] == 1
    assert options["max_retries"] > 0


def test_on_cpus_a_task_has_a_node():
    options = RayNodes("cpu", "a CPU", cpus_per_task=64).task_options(1)
    assert options["num_cpus"] == 64
    assert "num_gpus" not in options
    assert options["runtime_env"]["env_vars"]["TRITON_INTERPRET"] == "1"
