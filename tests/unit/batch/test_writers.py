# SPDX-License-Identifier: Apache-2.0
"""Catch an output file that is not whole, and a value that fails only when answers are there."""

from __future__ import annotations

import json
import math
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_layerskip.batch.output import Answer
from vllm_layerskip.batch.writers import output_record, writer_of

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

HALF = "\ud83d"
ONE_DAY = timedelta(days=1)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def write(path, rows, files=()):
    """See all rows, then write them with answers."""
    writer = writer_of(path, files, with_token_ids=True)
    for index, row in enumerate(rows):
        writer.see({**row, "id": index})
    answers = [Answer(i, f"<{i}>", (i, 7), "stop", 3) for i in range(len(rows))]
    writer.write(
        path,
        (
            output_record(i, row, a, True)
            for i, (row, a) in enumerate(zip(rows, answers, strict=True))
        ),
    )


def read(path):
    if path.suffix == ".parquet":
        return parquet.read_table(path).to_pylist()
    return [json.loads(line, parse_constant=pytest.fail) for line in path.open(encoding="utf-8")]


def written(path, *values, files=()):
    """What ``values`` of a column are in the output."""
    write(path, [{"c": value} for value in values], files)
    rows = read(path)
    assert [(r["id"], r["text"], r["token_ids"]) for r in rows] == [
        (i, f"<{i}>", [i, 7]) for i in range(len(values))
    ]
    return [row["c"] for row in rows]


@pytest.mark.parametrize("name", ["output.jsonl", "output.parquet"])
def test_a_failed_write_leaves_no_output(tmp_path, name):
    def records():
        yield {"id": 1}
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        writer_of(tmp_path / name, [], False).write(tmp_path / name, records())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "form"),
    [
        (datetime(2026, 1, 2, 3, 4, 5, 600), "2026-01-02T03:04:05.000600"),
        (datetime(2026, 1, 2, tzinfo=UTC), "2026-01-02T00:00:00+00:00"),
        (date(2026, 1, 2), "2026-01-02"),
        (time(3, 4), "03:04:00"),
        (timedelta(days=1, seconds=1, microseconds=500_000), "PT86401.5S"),
        (-timedelta(seconds=1, microseconds=500_000), "-PT1.5S"),
        (timedelta(0), "PT0S"),
        (Decimal("1.10"), "1.10"),
        (b"\xff\x00", "/wA="),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (math.nan, "NaN"),
        (-math.inf, "-Infinity"),
        ([("k", 1)], [["k", 1]]),
        ({"deep": [{"t": date(2026, 1, 2)}]}, {"deep": [{"t": "2026-01-02"}]}),
        (2**70, 2**70),
        (HALF, HALF),
        ({}, {}),
        (None, None),
    ],
)
def test_what_json_does_not_have_becomes_a_text(tmp_path, value, form):
    assert written(tmp_path / "output.jsonl", value) == [form]


def test_numpys_values_are_those_of_python(tmp_path):
    numpy = pytest.importorskip("numpy")
    values = [numpy.float32(0.5), numpy.int64(3), numpy.array([1, 2]), numpy.bool_(True)]
    assert written(tmp_path / "output.jsonl", *values) == [0.5, 3, [1, 2], True]


@pytest.mark.parametrize(
    ("values", "column"),
    [
        ([1, "one", None, 2.5, True], ["1", "one", None, "2.5", "true"]),
        ([1, 2.5], [1.0, 2.5]),
        ([1, 2**63], ["1", str(2**63)]),
        ([2**53 + 1, 0.5], [str(2**53 + 1), "0.5"]),
        ([2**70], [str(2**70)]),
        ([{}, {}], ["{}", "{}"]),
        ([{}, {"a": 1}], [{"a": None}, {"a": 1}]),
        ([{"a": 1}, {"a": "x", "b": []}], [{"a": "1", "b": None}, {"a": "x", "b": []}]),
        ([[1], "x"], ["[1]", "x"]),
        ([[1, "x", None]], [["1", "x", None]]),
        ([math.inf, 1], [math.inf, 1.0]),
        ([math.nan, "x"], ["NaN", "x"]),
        ([date(2026, 1, 2), b"\xff"], ["2026-01-02", "/w=="]),
        ([None, None], [None, None]),
        ([[], [[]]], [[], [[]]]),
    ],
)
def test_values_without_a_type_in_common_become_texts(tmp_path, values, column):
    assert written(tmp_path / "output.parquet", *values) == column


def test_objects_with_ever_new_keys_become_texts(tmp_path):
    values = [{f"key {i}": i} for i in range(1001)]
    column = written(tmp_path / "output.parquet", *values)
    assert [json.loads(text) for text in column] == values


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("output.parquet", HALF, "half of a surrogate pair"),
        ("output.parquet", [{HALF: 1}], "half of a surrogate pair"),
        ("output.parquet", object(), "a value of type object has no form"),
        ("output.jsonl", object(), "a value of type object has no form"),
        ("output.jsonl", {1: 2}, "the key 1 of an object is no text"),
    ],
)
def test_what_has_no_form_is_refused_with_its_column(tmp_path, name, value, reason):
    writer = writer_of(tmp_path / name, [], False)
    with pytest.raises(ValueError, match=f"column 'c': .*{reason}"):
        writer.see({"b": 1, "c": value})


@pytest.mark.parametrize("name", ["output.jsonl", "output.parquet"])
def test_depth_has_a_limit_that_can_be_written_and_read(tmp_path, name):
    def nested(levels):
        value = 1
        for _ in range(levels):
            value = [value]
        return value

    (value,) = written(tmp_path / name, nested(64))
    while isinstance(value, list):
        (value,) = value
    # Parquet's readers have a limit of their own: what is below it is JSON.
    assert value == (1 if name == "output.jsonl" else json.dumps(nested(32)))
    with pytest.raises(ValueError, match="column 'c': it nests more than 64 levels"):
        writer_of(tmp_path / name, [], False).see({"c": nested(65)})


def test_a_column_that_has_a_type_keeps_it(tmp_path):
    table = pyarrow.table(
        {
            "t": pyarrow.array([1, None], pyarrow.timestamp("ns", "UTC")),
            "d": pyarrow.array([Decimal("1.10"), None], pyarrow.decimal128(9, 2)),
            "m": pyarrow.array([[("k", 1)], None], pyarrow.map_(pyarrow.string(), "int8")),
            "e": pyarrow.array(["a", None]).dictionary_encode(),
            "u": pyarrow.array([2**64 - 1, None], "uint64"),
            "b": pyarrow.array([b"\xff", None]),
            "uuid": pyarrow.array([UUID(int=1).bytes, None], pyarrow.uuid()),
            "s": pyarrow.array([{"x": 1}, None], pyarrow.struct({"x": "int16", "y": "float32"})),
        }
    )
    parquet.write_table(table, tmp_path / "in.parquet")
    rows = parquet.read_table(tmp_path / "in.parquet").to_pylist()
    write(tmp_path / "output.parquet", rows, [tmp_path / "in.parquet"])
    output = parquet.read_table(tmp_path / "output.parquet").select(table.column_names)
    assert output.equals(parquet.read_table(tmp_path / "in.parquet"))


def test_a_column_whose_type_cannot_be_made_of_values_becomes_text(tmp_path):
    uuid = UUID(int=1)
    lists = pyarrow.ListArray.from_arrays([0, 1], pyarrow.array([uuid.bytes], pyarrow.uuid()))
    parquet.write_table(pyarrow.table({"c": lists}), tmp_path / "in.parquet")
    path = tmp_path / "output.parquet"
    assert written(path, [uuid], files=[tmp_path / "in.parquet"]) == [[str(uuid)]]


def test_a_type_that_files_do_not_share_is_found_anew(tmp_path):
    parquet.write_table(pyarrow.table({"c": [1]}), tmp_path / "1.parquet")
    parquet.write_table(pyarrow.table({"c": [date(2026, 1, 2)]}), tmp_path / "2.parquet")
    files = [tmp_path / "1.parquet", tmp_path / "2.parquet"]
    column = written(tmp_path / "output.parquet", 1, date(2026, 1, 2), files=files)
    assert column == ["1", "2026-01-02"]


def test_a_column_that_does_not_take_its_values_back_gets_another_type(tmp_path):
    parquet.write_table(pyarrow.table({"c": [1]}), tmp_path / "1.parquet")
    path = tmp_path / "output.parquet"
    assert written(path, 1, "x", files=[tmp_path / "1.parquet"]) == ["1", "x"]


def test_half_a_surrogate_pair_in_an_error_or_answer_is_escaped(tmp_path):
    for name in ("output.jsonl", "output.parquet"):
        writer = writer_of(tmp_path / name, [], False)
        record = output_record(0, {}, Answer(0, text=HALF, error=HALF), False)
        writer.write(tmp_path / name, [record])
        (row,) = read(tmp_path / name)
        assert (row["text"], row["error"]) == ("\\ud83d", "\\ud83d")


TEXTS = st.text(max_size=3) | st.just(HALF)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
    | st.integers(2**53 - 2, 2**64 + 2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
OTHERS = (
    st.datetimes() | st.dates() | st.times() | st.timedeltas() | st.decimals() | st.binary()
    | st.uuids() | st.datetimes(timezones=st.just(UTC)) | st.lists(st.tuples(JSON, JSON))
)  # fmt: skip
ROWS = st.lists(
    st.dictionaries(st.sampled_from(["a", "b", "", HALF, "x.y", "\0"]), JSON | OTHERS),
    max_size=4,
)


@pytest.mark.parametrize("name", ["output.jsonl", "output.parquet"])
@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=ROWS)
def test_what_is_not_refused_is_written_and_can_be_read(tmp_path, name, rows):
    accepted, refusals = [], []
    for row in rows:
        try:
            writer_of(tmp_path / name, [], True).see(row)
        except ValueError as error:
            refusals.append(str(error))
        else:
            accepted.append(row)
    assert all(refusal.startswith("column ") for refusal in refusals)
    if name == "output.jsonl":
        assert len(accepted) == len(rows)
    write(tmp_path / name, accepted)
    output = read(tmp_path / name)
    assert [row["id"] for row in output] == list(range(len(accepted)))
    for row, back in zip(accepted, output, strict=True):
        for column, value in row.items():
            assert (back[column] is None) == (value is None)
            if isinstance(value, str):
                assert back[column] == value
            if name == "output.jsonl" and isinstance(value, int):
                assert back[column] == value


SCALARS = {
    pyarrow.int8(): st.integers(-(2**7), 2**7 - 1),
    pyarrow.uint64(): st.integers(0, 2**64 - 1),
    pyarrow.float32(): st.floats(width=32),
    pyarrow.float16(): st.floats(width=16),
    pyarrow.bool_(): st.booleans(),
    pyarrow.string(): st.text(),
    pyarrow.large_string(): st.text(),
    pyarrow.binary(): st.binary(),
    pyarrow.binary(3): st.binary(min_size=3, max_size=3),
    pyarrow.date32(): st.dates(),
    pyarrow.date64(): st.dates(),
    pyarrow.time32("s"): st.times().map(lambda t: t.replace(microsecond=0)),
    pyarrow.time64("us"): st.times(),
    pyarrow.duration("us"): st.timedeltas(-(10**6) * ONE_DAY, 10**6 * ONE_DAY),
    pyarrow.timestamp("us"): st.datetimes(),
    pyarrow.timestamp("ns"): st.integers(-(2**62), 2**62),
    pyarrow.timestamp("ms", "Europe/Berlin"): st.integers(0, 2**40),
    pyarrow.decimal128(12, 3): st.decimals(-(10**8), 10**8, places=3),
    pyarrow.decimal256(50, 3): st.decimals(-(10**8), 10**8, places=3),
    pyarrow.dictionary("int32", pyarrow.string()): st.sampled_from(["a", "b"]),
    pyarrow.null(): st.none(),
}
TYPES = st.recursive(
    st.sampled_from(list(SCALARS)),
    lambda inner: (
        inner.map(pyarrow.list_)
        | inner.map(lambda t: pyarrow.list_(t, 2))
        | st.tuples(inner, inner).map(lambda t: pyarrow.struct({"x": t[0], "y": t[1]}))
        | inner.map(lambda t: pyarrow.map_(pyarrow.string(), t))
    ),
    max_leaves=3,
)


def values_of(type_):
    """Values that a column of a type takes."""
    if type_ in SCALARS:
        return st.none() | SCALARS[type_]
    if pyarrow.types.is_struct(type_):
        return st.none() | st.fixed_dictionaries({f.name: values_of(f.type) for f in type_})
    if pyarrow.types.is_map(type_):
        return st.none() | st.lists(
            st.tuples(st.text(max_size=2), values_of(type_.item_type)), max_size=2
        )
    size = type_.list_size if pyarrow.types.is_fixed_size_list(type_) else None
    return st.none() | st.lists(values_of(type_.value_type), min_size=size or 0, max_size=size or 3)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_every_table_passes_to_both_outputs(tmp_path, data):
    type_ = data.draw(TYPES)
    values = data.draw(st.lists(values_of(type_), min_size=1, max_size=3))
    source = tmp_path / "in.parquet"
    parquet.write_table(pyarrow.table({"c": pyarrow.array(values, type_)}), source)
    column = parquet.read_table(source)["c"]
    for name in ("output.jsonl", "output.parquet"):
        write(tmp_path / name, [{"c": value} for value in column.to_pylist()], [source])
        assert [r["id"] for r in read(tmp_path / name)] == list(range(len(values)))
    output = parquet.read_table(tmp_path / "output.parquet")["c"]
    assert output.type == column.type
    assert repr(output.to_pylist()) == repr(column.to_pylist())
