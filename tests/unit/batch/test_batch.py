# SPDX-License-Identifier: Apache-2.0
"""Catch a row that is lost, doubled or mixed up, and a bad row that ends a job of good ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_layerskip.batch import job
from vllm_layerskip.batch.output import PARTIAL, Answer, Journal, write_output
from vllm_layerskip.batch.parameters import PARAMETERS, merged
from vllm_layerskip.batch.ray_data import (
    Cluster,
    check_room,
    handed_on,
    processor_arguments,
)
from vllm_layerskip.batch.rows import input_files, read_rows
from vllm_layerskip.batch.settings import JobSettings, claim, clear
from vllm_layerskip.commands.main import main
from vllm_layerskip.errors import UserError

DEFAULTS = merged({}, None)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def _write(path: Path, *records) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def _answer_all(rows):
    """Answers backwards, as engines may."""
    for row in reversed(list(rows)):
        yield Answer(row.index, f"<{row.prompt}>", (row.index, 7), "stop", 3)


def _run(folder, files, generate=_answer_all, output="output.jsonl"):
    folder.mkdir(exist_ok=True)
    return job.run(files, DEFAULTS, folder, folder / output, True, generate)


def _outputs(folder):
    return [json.loads(line) for line in (folder / "output.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("record", "error"),
    [
        ("{no json", "line 1: this is no JSON"),
        ("[1]", "a row must be a JSON object"),
        ({}, "this one has none of them"),
        ({"prompt": "a", "messages": []}, "this one has prompt and messages"),
        ({"prompt": ""}, "a text that is not empty"),
        ({"prompt": 3}, "a text that is not empty"),
        ({"prompt_token_ids": []}, "a list that is not empty"),
        ({"prompt_token_ids": [1, -1]}, "integers of at least 0"),
        ({"messages": ["hi"]}, "each must be an object with role"),
        ({"prompt": "a", "id": [1]}, "id=[1] must be a text or an integer"),
        ({"prompt": "a", "sampling_params": 3}, "sampling_params must be an object"),
        ({"prompt": "a", "sampling_params": {"min_p": 0.1}}, "'min_p' is not supported. Valid are"),
        ({"prompt": "a", "sampling_params": {"top_p": 0}}, "top_p=0 must be a number above 0"),
        ({"prompt": "a", "sampling_params": {"stop": "x"}}, "stop='x' must be a list of texts"),
        ({"prompt": "a", "sampling_params": {"max_tokens": True}}, "max_tokens=True must be"),
        ({"prompt": "a", "sampling_params": {"min_tokens": 999}}, "min_tokens=999 must be at most"),
    ],
)
def test_a_bad_row_gets_an_error_and_its_neighbours_answers(tmp_path, record, error):
    files = [_write(tmp_path / "in.jsonl", record, {"prompt": "good"})]
    summary = _run(tmp_path / "out", files)
    bad, good = _outputs(tmp_path / "out")
    assert error in bad["error"]
    assert bad["text"] is None
    assert (good["error"], good["text"], good["id"]) == (None, "<good>", 1)
    assert (summary.num_rows, summary.num_errors, summary.num_output_tokens) == (2, 1, 2)


def test_order_ids_and_columns_are_kept(tmp_path):
    records = [
        {"prompt": "a", "id": "x", "category": "code", "text": "of the input"},
        {"prompt": "b", "custom_id": 17},
        {"prompt": "c", "answer": {"nested": [1]}},
    ]
    files = [_write(tmp_path / "1.jsonl", *records[:2]), _write(tmp_path / "2.jsonl", records[2])]
    _run(tmp_path / "out", files)
    outputs = _outputs(tmp_path / "out")
    assert [o["id"] for o in outputs] == ["x", 17, 2]
    assert [o["text"] for o in outputs] == ["<a>", "<b>", "<c>"]
    assert outputs[0]["category"] == "code"
    assert outputs[2]["answer"] == {"nested": [1]}
    assert [o["token_ids"] for o in outputs] == [[0, 7], [1, 7], [2, 7]]
    assert not (tmp_path / "out" / PARTIAL).exists()


def test_parquet_in_and_out(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    records = [{"prompt": "a", "id": "x", "n": None}, {"prompt": None, "id": "y", "n": 3}]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "in.parquet")
    _run(tmp_path / "out", [tmp_path / "in.parquet"], output="output.parquet")
    rows = parquet.read_table(tmp_path / "out" / "output.parquet").to_pylist()
    assert [(r["id"], r["text"], r["n"]) for r in rows] == [("x", "<a>", None), ("y", None, 3)]
    assert "this one has none of them" in rows[1]["error"]


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_a_run_that_was_cut_off_anywhere_goes_on_and_answers_each_row_once(tmp_path_factory, data):
    tmp_path = tmp_path_factory.mktemp("job")
    num_rows = data.draw(st.integers(1, 6))
    records = [{"prompt": f"p{i}"} if i % 3 else {"prompt": ""} for i in range(num_rows)]
    files, folder = [_write(tmp_path / "in.jsonl", *records)], tmp_path / "out"
    asked: list[int] = []

    def die_after(num_served):
        def generate(rows):
            for number, answer in enumerate(_answer_all(rows)):
                if number == num_served:
                    raise RuntimeError("cut off")
                asked.append(answer.index)
                yield answer

        return generate

    for num_served in data.draw(st.lists(st.integers(0, num_rows - 1), max_size=4)):
        try:
            _run(folder, files, die_after(num_served))
        except RuntimeError:
            # A crash may leave a part of a line, or lose whole ones.
            partial = folder / PARTIAL
            content = partial.read_bytes()
            partial.write_bytes(content[: data.draw(st.integers(0, len(content)))])
        else:
            break
    else:
        _run(folder, files, die_after(None))
    outputs = _outputs(folder)
    assert [o["text"] for o in outputs] == [f"<p{i}>" if i % 3 else None for i in range(num_rows)]
    assert set(asked) == {i for i in range(num_rows) if i % 3}


def test_only_rows_without_an_answer_are_asked_again(tmp_path):
    files = [_write(tmp_path / "in.jsonl", *({"prompt": f"p{i}"} for i in range(4)))]
    (tmp_path / "out").mkdir()
    with Journal(tmp_path / "out") as journal:
        journal.add(Answer(2, "earlier", (1,), "stop", 1))
        with pytest.raises(ValueError, match="Row 2 has got a second answer"):
            journal.add(Answer(2, "again"))
    asked = []

    def generate(rows):
        rows = list(rows)
        asked.extend(row.index for row in rows)
        return _answer_all(rows)

    summary = _run(tmp_path / "out", files, generate)
    assert asked == [0, 1, 3]
    assert _outputs(tmp_path / "out")[2]["text"] == "earlier"
    assert (summary.num_rows, summary.num_rows_of_this_run) == (4, 3)


def test_rows_that_the_engines_left_out_are_an_error_and_no_output(tmp_path):
    files = [_write(tmp_path / "in.jsonl", {"prompt": "a"}, {"prompt": "b"})]
    with pytest.raises(RuntimeError, match="1 of 2 rows have no answer"):
        _run(tmp_path / "out", files, lambda rows: iter(list(_answer_all(rows))[:1]))
    assert not (tmp_path / "out" / "output.jsonl").exists()


def test_no_engine_starts_when_nothing_is_left_to_do(tmp_path):
    files = [_write(tmp_path / "in.jsonl", {"prompt": ""})]

    def never(rows):
        raise AssertionError("an engine was started")

    assert _run(tmp_path / "out", files, never).num_errors == 1


def test_equal_ids_are_an_error_before_an_engine_starts(tmp_path):
    files = [_write(tmp_path / "in.jsonl", {"prompt": "a", "id": 1}, {"prompt": "b"})]
    with pytest.raises(UserError, match="line 2: id 1 is row 0's, too"):
        list(read_rows(files, DEFAULTS))


def test_a_failed_write_leaves_no_output(tmp_path):
    def records():
        yield {"a": 1}
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_output(tmp_path / "output.jsonl", records())
    assert not (tmp_path / "output.jsonl").exists()


def test_folders_and_patterns(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "notes.txt"):
        (tmp_path / name).touch()
    assert [f.name for f in input_files([tmp_path])] == ["a.jsonl", "b.jsonl"]
    assert [f.name for f in input_files([tmp_path / "b*"])] == ["b.jsonl"]
    with pytest.raises(UserError, match="what kind of file is this"):
        input_files([tmp_path / "notes.txt"])
    with pytest.raises(UserError, match="there is no such file"):
        input_files([tmp_path / "none.jsonl"])


SETTINGS = JobSettings("m", {"method": "layerskip"}, {}, DEFAULTS, [("in.jsonl", "1")])


def test_a_folder_belongs_to_one_job(tmp_path):
    folder = tmp_path / "out"
    assert not claim(folder, SETTINGS)
    assert claim(folder, SETTINGS)
    other = JobSettings("m", None, {}, DEFAULTS, [("in.jsonl", "2")])
    with pytest.raises(UserError, match=r"(?s)speculative_config: .*input: .*--overwrite"):
        claim(folder, other)
    clear(folder)
    assert not claim(folder, other)


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="it is not empty"):
        claim(tmp_path, SETTINGS)
    clear(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--num-replicas", "0"], "--num-replicas 0 must be an integer of at least 1"),
        (["--temperature", "-1"], "temperature=-1.0 must be a number of at least 0"),
        (["--no-speculation", "--exit-layer", "3"], "--no-speculation excludes --exit-layer 3"),
        (["--engine-args", '{"model": "x"}'], "model cannot be given there. Use --model"),
    ],
)
def test_wrong_options(tmp_path, capsys, options, error):
    path = _write(tmp_path / "in.jsonl", {"prompt": "a"})
    arguments = ["generate", "--model", "m", "--input", str(path), "--output", str(tmp_path / "o")]
    assert main([*arguments, *options]) == 2
    assert error in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_parameters_are_vllms_and_have_vllms_meaning():
    from vllm import SamplingParams

    params = SamplingParams(**merged({}, None))
    for name, parameter in PARAMETERS.items():
        assert parameter.is_valid(parameter.default), name
        value = getattr(params, name)
        assert value == parameter.default or (parameter.default is None and not value), name


def test_arguments_of_ray_datas_processor():
    settings = JobSettings("m", {"method": "layerskip"}, {"dtype": "float32"}, DEFAULTS)
    arguments = processor_arguments(settings, Cluster(3, device="cpu"))
    assert arguments["concurrency"] == (3, 3)
    assert arguments["engine_kwargs"]["speculative_config"] == {"method": "layerskip"}
    assert arguments["placement_group_config"] == {"bundle_per_worker": {"CPU": 1}}
    assert arguments["should_continue_on_error"]
    assert "placement_group_config" not in processor_arguments(settings, Cluster(3))


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
        check_room(resources, Cluster(4, device=device), settings)
    else:
        with pytest.raises(UserError, match=error):
            check_room(resources, Cluster(4, device=device), settings)


def test_replicas_get_settings_and_no_addresses():
    variables = {
        "TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1", "VLLM_HOST_IP": "10.0.0.1",
        "VLLM_PORT": "1", "HF_HOME": "/home/me", "PATH": "/bin",
    }  # fmt: skip
    assert set(handed_on(variables)) == {"TRITON_INTERPRET", "VLLM_USE_V2_MODEL_RUNNER"}
