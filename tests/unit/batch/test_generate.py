# SPDX-License-Identifier: Apache-2.0
"""Catch a start that fails and keeps the folder, and answers that are computed twice or lost."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from unit.batch.batch_jobs import answer_all, write_rows
from vllm_layerskip.batch import job, one_engine
from vllm_layerskip.batch.generate import generate
from vllm_layerskip.batch.settings import BatchSettings, EngineSettings, OutputSettings
from vllm_layerskip.errors import UserError

ROWS = [{"prompt": "a", "id": "x", "n": 1}, {"prompt": ""}, {"prompt": "b", "n": "one"}]


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture
def engine(monkeypatch):
    """The indices of rows that engines were asked to answer, a list for each engine."""
    started: list[list[int]] = []

    def answers(rows, settings):
        rows = list(rows)
        started.append([row.index for row in rows])
        return answer_all(rows)

    monkeypatch.setattr(one_engine, "answers", answers)
    return started


@pytest.fixture
def run(tmp_path):
    """``run(**options)``: generate from ``in.jsonl`` into ``out``."""
    write_rows(tmp_path / "in.jsonl", *ROWS)
    return partial(_run, tmp_path)


def _run(folder: Path, rows=None, top_k=0, **output):
    if rows is not None:
        write_rows(folder / "in.jsonl", *rows)
    return generate(
        BatchSettings(
            [str(folder / "in.jsonl")],
            OutputSettings(folder / "out", **output),
            EngineSettings("m", device="cpu"),
            {"top_k": top_k},
        )
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def output(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "out" / "output.jsonl").open()]


def failing_engine(rows, settings):
    raise UserError("--dtype nonsense")
    yield


FAILING_STARTS = {
    "the engine": {},
    "equal ids": {"rows": [{"prompt": "a", "id": 1}] * 2},
    "a value that Parquet cannot hold": {
        "rows": [{"prompt": "a", "t": "\ud83d"}], "format": "parquet"
    },
    "a setting": {"top_k": -1},
}  # fmt: skip


@pytest.mark.parametrize("options", FAILING_STARTS.values(), ids=FAILING_STARTS)
def test_a_start_that_fails_makes_no_folder(run, tmp_path, monkeypatch, options):
    monkeypatch.setattr(one_engine, "answers", failing_engine)
    with pytest.raises(UserError):
        run(**options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", FAILING_STARTS.values(), ids=FAILING_STARTS)
def test_a_start_that_fails_overwrites_nothing(run, tmp_path, engine, monkeypatch, options):
    run()
    before = contents(tmp_path / "out")
    monkeypatch.setattr(one_engine, "answers", failing_engine)
    with pytest.raises(UserError):
        run(**options, overwrite=True)
    assert contents(tmp_path / "out") == before


def test_overwriting_begins_with_the_first_new_answer(run, tmp_path, engine):
    run()
    run(rows=[{"prompt": "c"}], overwrite=True)
    assert [row["text"] for row in output(tmp_path)] == ["<c>"]
    assert engine == [[0, 2], [0]]
    assert run() is None


def test_a_wrong_value_names_file_row_and_column(run, tmp_path, engine):
    rows = [{"prompt": "a"}, {"prompt": "b", "note": ["\ud83d"]}]
    with pytest.raises(UserError) as raised:
        run(rows=rows, format="parquet")
    assert str(raised.value).startswith(
        f"--input {tmp_path / 'in.jsonl'}, line 2: column 'note': the text has half of a surrogate"
    )
    assert engine == []
    assert run(rows=rows).num_rows == 2


def test_a_finished_job_writes_other_outputs_without_an_engine(run, tmp_path, engine):
    parquet = pytest.importorskip("pyarrow.parquet")
    first = run()
    assert (first.num_rows, first.num_errors, first.num_rows_of_this_run) == (3, 1, 2)
    assert "token_ids" not in output(tmp_path)[0]
    assert run() is None
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    again = run(with_token_ids=True)
    assert (again.num_rows, again.num_rows_of_this_run) == (3, 0)
    assert [row["token_ids"] for row in output(tmp_path)] == [[0, 7], None, [2, 7]]
    assert run(with_token_ids=True) is None
    run(format="parquet")
    table = parquet.read_table(tmp_path / "out" / "output.parquet")
    assert table["text"].to_pylist() == ["<a>", None, "<b>"]
    assert table["n"].to_pylist() == ["1", None, "one"]
    assert run(format="parquet") is None
    # What was written before stays, and so do the numbers of the run that answered.
    assert run(with_token_ids=True) is None
    after = json.loads((tmp_path / "out" / "summary.json").read_text())
    outputs = {"output.jsonl": True, "output.parquet": False}
    assert after == {**summary, "outputs": outputs}
    assert engine == [[0, 2]]


def test_an_output_that_was_removed_is_written_again(run, tmp_path, engine):
    run()
    before = output(tmp_path)
    (tmp_path / "out" / "output.jsonl").unlink()
    run()
    assert output(tmp_path) == before
    assert len(engine) == 1


def test_without_the_answers_another_output_is_refused_with_the_reason(run, tmp_path, engine):
    run()
    (tmp_path / "out" / "answers.jsonl").unlink()
    assert run() is None
    before = contents(tmp_path / "out")
    for options in ({"with_token_ids": True}, {"format": "parquet"}):
        with pytest.raises(UserError, match=r"\(answers.jsonl\) are not.* --overwrite answers"):
            run(**options)
    assert contents(tmp_path / "out") == before
    assert len(engine) == 1


def test_a_job_of_wrong_rows_only_needs_no_engine(run, tmp_path, engine):
    assert run(rows=[{"prompt": ""}]).num_errors == 1
    assert engine == []
    assert run() is None


def test_the_folder_of_an_earlier_version_is_gone_on_with(run, tmp_path, engine):
    """Its journal has wrong rows, too; its output, if it is there, has no journal."""
    run()
    folder = tmp_path / "out"
    lines = (folder / "answers.jsonl").read_text().splitlines(keepends=True)
    wrong = {**json.loads(lines[0]), "index": 1, "text": None, "error": "old"}
    (folder / "answers.partial.jsonl").write_text(json.dumps(wrong) + "\n" + lines[0])
    for name in ("answers.jsonl", "summary.json", "output.jsonl"):
        (folder / name).unlink()
    run()
    assert engine[1] == [0] if json.loads(lines[0])["index"] == 2 else [2]
    assert [row["text"] for row in output(tmp_path)] == ["<a>", None, "<b>"]
    (folder / "answers.jsonl").unlink()
    (folder / "summary.json").write_text("{}")
    assert run() is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text()
    | st.sampled_from(["\ud83d", "", "row-1", 2**31, 2**63, 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
TOKENS = st.lists(st.integers(-1, 9) | st.integers(2**31 - 1, 2**65) | JSON, max_size=4)
MESSAGES = st.lists(
    st.fixed_dictionaries({}, optional={"role": st.just("user") | JSON, "content": JSON}) | JSON,
    max_size=2,
)
PARAMETERS = st.dictionaries(
    st.sampled_from(
        ["temperature", "top_p", "top_k", "max_tokens", "min_tokens", "stop", "stop_token_ids",
         "seed", "max_completion_tokens", "ignore_eos", "repetition_penalty", "min_p"]
    ),
    JSON | TOKENS, max_size=3,
)  # fmt: skip
FIELDS = {
    "prompt": JSON, "prompt_token_ids": TOKENS | JSON, "messages": MESSAGES | JSON, "tools": JSON,
    "sampling_params": PARAMETERS | JSON, "method": st.just("POST") | JSON, "url": JSON,
    "body": st.fixed_dictionaries({}, optional={"messages": MESSAGES, "prompt": JSON}) | JSON,
    "note": JSON, "text": JSON,
}  # fmt: skip
ROW = st.fixed_dictionaries({}, optional=FIELDS) | JSON


def strict_engine(rows, settings):
    """Fails where an engine, Ray or a worker would fail for all rows, and not just for one."""
    import msgspec
    from vllm import SamplingParams

    rows = list(rows)
    for row in rows:
        SamplingParams(**row.sampling_params)
        assert 0 <= row.sampling_params["top_k"] < 2**31
        assert all(0 <= i < 2**31 for i in row.prompt_token_ids or ())
        json.dumps(row.sampling_params).encode()
        msgspec.msgpack.encode([row.prompt, row.prompt_token_ids, row.messages, row.tools])
        msgspec.msgpack.encode(row.sampling_params)
    return answer_all(rows)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=st.lists(ROW, min_size=1, max_size=4))
def test_any_row_ends_in_an_answer_or_in_an_error_of_that_row(tmp_path_factory, monkeypatch, rows):
    monkeypatch.setattr(one_engine, "answers", strict_engine)
    folder = tmp_path_factory.mktemp("job")
    try:
        _run(folder, rows=map(json.dumps, rows), with_token_ids=True)
    except UserError as error:
        # Hypothesis knows the names in our sources, ids too.
        assume("Ids must differ" not in str(error))
        raise
    outputs = output(folder)
    assert len(outputs) == len(rows)
    assert len({json.dumps(row["id"]) for row in outputs}) == len(rows)
    assert all((row["text"] is None) == bool(row["error"]) for row in outputs)
    with suppress(UserError):  # Half of a surrogate pair.
        _run(folder, format="parquet")


def _changing(folder, change):
    """An engine while which the input changes: it has read all rows before."""

    def answers(rows, settings):
        rows = list(rows)
        change(folder / "in.jsonl")
        return answer_all(rows)

    return answers


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda rows: rows[::-1], "line 1 is another row"),
        (lambda rows: [*rows, '{"prompt": "new"}'], "line 4 is another row"),
        (lambda rows: rows[:-1], "it has 1 rows less"),
        (lambda rows: [rows[0].replace("r0", "r9"), *rows[1:]], "line 1 is another row"),
        (lambda rows: [rows[0], "{broken", rows[2]], None),
    ],
    ids=["order", "more", "less", "id", "broken"],
)
def test_an_input_that_changes_meanwhile_gives_no_row_anothers_answer(
    tmp_path, monkeypatch, change, says
):
    rows = [json.dumps({"id": f"r{i}", "prompt": f"p{i}"}) for i in range(3)]

    def write(path):
        path.write_text("".join(f"{line}\n" for line in change(rows)))

    monkeypatch.setattr(one_engine, "answers", _changing(tmp_path, write))
    if says is None:
        _run(tmp_path, rows=rows)
        assert [(row["id"], row["text"]) for row in output(tmp_path)] == [
            ("r0", "<p0>"), ("row-1", None), ("r2", "<p2>")
        ]  # fmt: skip
        return
    with pytest.raises(UserError, match=f"{says} than when the job began. Put back"):
        _run(tmp_path, rows=rows)
    # The answers are still there, for the rows that they were given to.
    monkeypatch.setattr(one_engine, "answers", None)
    _run(tmp_path, rows=rows)
    assert [(row["id"], row["text"]) for row in output(tmp_path)] == [
        (f"r{i}", f"<p{i}>") for i in range(3)
    ]


def test_answers_to_other_rows_are_given_again(tmp_path, monkeypatch):
    """The input was another one while they were made, and is put back."""
    rows = [json.dumps({"prompt": f"p{i}"}) for i in range(3)]

    def answers(given, settings):
        # What this engine reads is not what the job began with.
        return answer_all([replace(row, prompt="other") for row in given])

    real = job._digest
    monkeypatch.setattr(one_engine, "answers", answers)
    monkeypatch.setattr(job, "_digest", lambda row: real(replace(row, prompt="other")))
    _run(tmp_path, rows=rows)
    monkeypatch.setattr(job, "_digest", real)
    monkeypatch.setattr(one_engine, "answers", lambda given, settings: answer_all(given))
    (tmp_path / "out/output.jsonl").unlink()
    _run(tmp_path, rows=rows)
    assert [row["text"] for row in output(tmp_path)] == ["<p0>", "<p1>", "<p2>"]


def test_a_second_run_in_the_same_folder_is_refused(tmp_path, monkeypatch):
    refused = []

    def answers(rows, settings):
        first, *others = rows
        yield from answer_all([first])
        for options in ({}, {"overwrite": True}):
            with pytest.raises(UserError, match="another run writes to it") as error:
                _run(tmp_path, **options)
            refused.append(error)
        yield from answer_all(others)

    monkeypatch.setattr(one_engine, "answers", answers)
    _run(tmp_path, rows=['"a"', '"b"'])
    assert len(refused) == 2
    assert [row["text"] for row in output(tmp_path)] == ["<a>", "<b>"]
    _run(tmp_path, with_token_ids=True)  # The lock is gone.


def test_the_same_input_by_another_path_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(one_engine, "answers", lambda rows, settings: answer_all(rows))
    _run(tmp_path, rows=['"a"'])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(one_engine, "answers", None)
    assert _run(Path()) is None


@pytest.mark.parametrize("damage", ["\0\0\n", "[]\n", '{"index": 1\n'])
def test_a_damaged_journal_costs_answers_and_no_job(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(one_engine, "answers", lambda rows, settings: answer_all(rows))
    _run(tmp_path, rows=['"a"', '"b"'])
    answers = tmp_path / "out/answers.jsonl"
    answers.write_text(answers.read_text().splitlines(keepends=True)[0] + damage)
    (tmp_path / "out/summary.json").write_text("null")
    (tmp_path / "out/output.jsonl").unlink()
    _run(tmp_path)
    assert [row["text"] for row in output(tmp_path)] == ["<a>", "<b>"]


@pytest.mark.parametrize("depth", [100, 900])
def test_a_column_that_is_too_deep_is_refused_by_name(tmp_path, engine, depth):
    row = '{"prompt": "a", "deep": ' + "[" * depth + "]" * depth + "}"
    with pytest.raises(UserError, match=r"line 1: column 'deep': it nests more than"):
        _run(tmp_path, rows=[row])
    assert engine == []
    assert not (tmp_path / "out").exists()
