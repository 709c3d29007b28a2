# SPDX-License-Identifier: Apache-2.0
"""Catch a row that is lost, doubled or mixed up, and a bad row that ends a job of good ones."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unit.batch.batch_jobs import answer_all, read_output, run_job, write_rows
from vllm_layerskip.batch.folder import ANSWERS
from vllm_layerskip.batch.output import Answer, Journal


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.mark.parametrize(
    ("record", "error"),
    [
        ("{no json", "line 1: this is no JSON"),
        pytest.param("[" * 100_000, "line 1: this is no JSON", id="deep"),
        ("[1]", "a row must be a JSON object or a text, not [1]"),
        pytest.param("[" * 900 + "]" * 900, "a row must be a JSON object or a text", id="deep 2"),
        ({}, "this one has none of them"),
        ({"prompt": "a", "messages": []}, "this one has prompt and messages"),
        ({"prompt": ""}, "a text that is not empty"),
        ({"prompt": 3}, "a text that is not empty"),
        ({"prompt_token_ids": []}, "a list that is not empty"),
        ({"prompt_token_ids": [1, -1]}, "integers from 0 to 2147483647"),
        ({"prompt_token_ids": [2**31]}, "integers from 0 to 2147483647"),
        ({"prompt_token_ids": [2**64]}, "integers from 0 to 2147483647"),
        ({"prompt_token_ids": [True]}, "integers from 0 to 2147483647"),
        ({"prompt": "a \ud83d"}, "prompt: the text has half of a surrogate pair"),
        (
            {"messages": [{"role": "user", "content": [{"text": "\ud83d"}]}]},
            "messages: the text has half of a surrogate pair",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}], "tools": [{"\ud83d": 1}]},
            "tools: the text has half of a surrogate pair",
        ),
        ({"messages": [{"role": "user", "content": "a"}], "tools": 3}, "tools=3 must be a list"),
        ({"prompt": "a", "sampling_params": {"stop": "\ud83d"}}, "sampling_params: the text has"),
        pytest.param(
            '{"prompt": ' + "[" * 900 + "]" * 900 + "}", "prompt: it nests more than", id="deep 3"
        ),
        ({"messages": ["hi"]}, "each must be an object with role"),
        ({"prompt": "a", "id": [1]}, "id=[1] must be a text or an integer"),
        ({"prompt": "a", "sampling_params": 3}, "sampling_params must be an object"),
        ({"prompt": "a", "sampling_params": {"min_p": 0.1}}, "'min_p' is not supported. Valid are"),
        ({"prompt": "a", "sampling_params": {"top_p": 0}}, "top_p=0 must be a number above 0"),
        ({"prompt": "a", "sampling_params": {"stop": 3}}, "stop=3 must be a text or a list of"),
        ({"prompt": "a", "sampling_params": {"max_tokens": True}}, "max_tokens=True must be"),
        ({"prompt": "a", "sampling_params": {"min_tokens": 999}}, "min_tokens=999 must be at most"),
    ],
)
def test_a_bad_row_gets_an_error_and_its_neighbours_answers(tmp_path, record, error):
    files = [write_rows(tmp_path / "in.jsonl", record, {"prompt": "good"})]
    asked = []

    def generate(rows):
        asked.extend(rows)
        return answer_all(asked)

    summary = run_job(tmp_path / "out", files, generate)
    assert [row.index for row in asked] == [1]
    bad, good = read_output(tmp_path / "out")
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
    files = [
        write_rows(tmp_path / "1.jsonl", *records[:2]),
        write_rows(tmp_path / "2.jsonl", records[2]),
    ]
    run_job(tmp_path / "out", files)
    outputs = read_output(tmp_path / "out")
    assert [o["id"] for o in outputs] == ["x", 17, "row-2"]
    assert [o["text"] for o in outputs] == ["<a>", "<b>", "<c>"]
    assert outputs[0]["category"] == "code"
    assert outputs[2]["answer"] == {"nested": [1]}
    assert [o["token_ids"] for o in outputs] == [[0, 7], [1, 7], [2, 7]]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "answers.jsonl", "output.jsonl", "summary.json",
    }  # fmt: skip


def test_half_of_a_surrogate_pair_is_handed_through(tmp_path):
    """JSON can escape it, UTF-8 cannot hold it; it must not cost the others their output."""
    rows = [r'{"prompt": "a", "id": "\ud83d", "note": "\ud83d"}', {"prompt": "b"}]
    run_job(tmp_path / "out", [write_rows(tmp_path / "in.jsonl", *rows)])
    outputs = read_output(tmp_path / "out")
    assert [(o["id"], o["text"]) for o in outputs] == [("\ud83d", "<a>"), ("row-1", "<b>")]
    assert outputs[0]["note"] == "\ud83d"


def test_parquet_in_and_out(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    records = [{"prompt": "a", "id": "x", "n": None}, {"prompt": None, "id": "y", "n": 3}]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "in.parquet")
    run_job(tmp_path / "out", [tmp_path / "in.parquet"], output="output.parquet")
    table = parquet.read_table(tmp_path / "out" / "output.parquet")
    assert table.column_names == [
        "n", "id", "text", "finish_reason", "num_prompt_tokens", "num_output_tokens", "error",
        "token_ids",
    ]  # fmt: skip
    rows = table.to_pylist()
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
    files, folder = [write_rows(tmp_path / "in.jsonl", *records)], tmp_path / "out"
    asked: list[int] = []

    def die_after(num_served):
        def generate(rows):
            for number, answer in enumerate(answer_all(rows)):
                if number == num_served:
                    raise RuntimeError("cut off")
                asked.append(answer.index)
                yield answer

        return generate

    for num_served in data.draw(st.lists(st.integers(0, num_rows - 1), max_size=4)):
        try:
            run_job(folder, files, die_after(num_served))
        except RuntimeError:
            # A crash may leave a part of a line, or lose whole ones.
            partial = folder / ANSWERS
            if partial.exists():
                content = partial.read_bytes()
                partial.write_bytes(content[: data.draw(st.integers(0, len(content)))])
        else:
            break
    else:
        run_job(folder, files, die_after(None))
    outputs = read_output(folder)
    assert [o["text"] for o in outputs] == [f"<p{i}>" if i % 3 else None for i in range(num_rows)]
    assert set(asked) == {i for i in range(num_rows) if i % 3}


def test_only_rows_without_an_answer_are_asked_again(tmp_path):
    files = [write_rows(tmp_path / "in.jsonl", *({"prompt": f"p{i}"} for i in range(4)))]
    (tmp_path / "out").mkdir()
    with Journal(tmp_path / "out", lambda: None) as journal:
        journal.add(Answer(2, "earlier", (1,), "stop", 1))
        with pytest.raises(ValueError, match="Row 2 has got a second answer"):
            journal.add(Answer(2, "again"))
    asked = []

    def generate(rows):
        rows = list(rows)
        asked.extend(row.index for row in rows)
        return answer_all(rows)

    summary = run_job(tmp_path / "out", files, generate)
    assert asked == [0, 1, 3]
    assert read_output(tmp_path / "out")[2]["text"] == "earlier"
    assert (summary.num_rows, summary.num_rows_of_this_run) == (4, 3)


def test_rows_that_the_engines_left_out_are_an_error_and_no_output(tmp_path):
    files = [write_rows(tmp_path / "in.jsonl", {"prompt": "a"}, {"prompt": "b"})]
    with pytest.raises(RuntimeError, match="1 of 2 rows have no answer"):
        run_job(tmp_path / "out", files, lambda rows: iter(list(answer_all(rows))[:1]))
    assert not (tmp_path / "out" / "output.jsonl").exists()


def test_no_engine_starts_when_nothing_is_left_to_do(tmp_path):
    files = [write_rows(tmp_path / "in.jsonl", {"prompt": ""})]

    def never(rows):
        raise AssertionError("an engine was started")

    assert run_job(tmp_path / "out", files, never).num_errors == 1
    assert read_output(tmp_path / "out")[0]["error"]
