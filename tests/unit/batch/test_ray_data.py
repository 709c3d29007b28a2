# SPDX-License-Identifier: Apache-2.0
"""Catch replicas without room or with another machine's addresses, and arguments that get lost."""

from __future__ import annotations

import pytest

from unit.batch.batch_jobs import DEFAULTS
from vllm_layerskip.batch.parameters import merged
from vllm_layerskip.batch.ray_data import check_room, fill_nulls, handed_on, processor_arguments
from vllm_layerskip.batch.settings import JobSettings, RayCluster
from vllm_layerskip.errors import UserError


def test_arguments_of_ray_datas_processor():
    settings = JobSettings("m", {"method": "layerskip"}, {"dtype": "float32"}, DEFAULTS)
    arguments = processor_arguments(settings, RayCluster(3, device="cpu"))
    assert arguments["concurrency"] == (3, 3)
    assert arguments["engine_kwargs"]["speculative_config"] == {"method": "layerskip"}
    assert arguments["placement_group_config"] == {"bundle_per_worker": {"CPU": 1}}
    assert arguments["should_continue_on_error"]
    assert "placement_group_config" not in processor_arguments(settings, RayCluster(3))


@pytest.mark.parametrize(
    ("device", "resources", "size", "error"),
    [
        ("cuda", {"GPU": 8, "CPU": 1}, 2, None),
        ("cuda", {"GPU": 7}, 2, "they need 8 GPUs, and the cluster has 7"),
        ("cuda", {"CPU": 64}, 1, "they need 4 GPUs, and the cluster has 0"),
        ("cpu", {"CPU": 5}, 1, None),
        # Ray Data's other stages would never get a CPU.
        ("cpu", {"CPU": 4}, 1, "they need 5 CPUs, and the cluster has 4"),
    ],
)
def test_a_cluster_that_is_too_small_is_an_error_and_no_endless_wait(
    device, resources, size, error
):
    settings = JobSettings("m", None, {"tensor_parallel_size": size}, DEFAULTS)
    if error is None:
        check_room(resources, RayCluster(4, device=device), settings)
    else:
        with pytest.raises(UserError, match=error):
            check_room(resources, RayCluster(4, device=device), settings)


def test_replicas_get_settings_and_no_addresses():
    variables = {
        "TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1", "VLLM_HOST_IP": "10.0.0.1",
        "VLLM_PORT": "1", "HF_HOME": "/home/me", "PATH": "/bin",
    }  # fmt: skip
    assert set(handed_on(variables)) == {"TRITON_INTERPRET", "VLLM_USE_V2_MODEL_RUNNER"}


def test_a_parameter_that_some_rows_have_is_null_in_none():
    """Ray would make floats of the others' integers, and wait forever for the answer."""
    rows = [merged({}, {}), merged({}, {"seed": 3, "stop": ["a"], "max_tokens": 5}), merged({}, {})]
    fill_nulls(rows)
    seeds = [row["seed"] for row in rows]
    assert seeds[1] == 3
    assert len(set(seeds)) == 3
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert [row["stop"] for row in rows] == [[], ["a"], []]
    assert [row["stop_token_ids"] for row in rows] == [None] * 3


def test_every_parameter_that_may_be_null_has_another_form():
    rows = [merged({}, {}), merged({}, {"seed": 3, "stop": ["a"], "stop_token_ids": [1]})]
    assert {name for name, value in rows[0].items() if value is None} == {
        name for name, value in rows[1].items() if value != rows[0][name]
    }
    fill_nulls(rows)
    assert None not in rows[0].values()


def test_a_node_says_in_a_line_what_is_wrong_with_the_settings(checkpoint):
    from vllm_layerskip.batch.ray_data import _mistake_in

    engine = {"dtype": "float32", "skip_tokenizer_init": True}
    right = {"method": "layerskip", "exit_layer": 2, "num_speculative_tokens": 2}
    assert _mistake_in(JobSettings(checkpoint, right, engine, DEFAULTS)) is None
    wrong = {**right, "exit_layer": 99}
    mistake = _mistake_in(JobSettings(checkpoint, wrong, engine, DEFAULTS))
    assert mistake is not None
    assert mistake.startswith("--exit-layer 99: ")
