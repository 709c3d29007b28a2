# SPDX-License-Identifier: Apache-2.0
"""One reader for five commands: each form of a file gives the same records, to each command."""

import codecs
import datetime
import gzip
import json

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from vllm_layerskip.errors import UserError
from vllm_layerskip.evaluation.data import read_documents
from vllm_layerskip.files.records import (
    good_records,
    is_unicode,
    read_records,
    text_lines,
    text_of,
    without_nulls,
)
from vllm_layerskip.files.token_counts import _texts
from vllm_layerskip.training.config import DataConfig, Source
from vllm_layerskip.training.records import open_records
from vllm_layerskip.tuning.prompts import read_prompts

TEXTS = ["one\u2028line", "two\nlines, é\x0b\x85", "3 \U0001f600"]
RECORDS = [{"text": text, "n": number} for number, text in enumerate(TEXTS)]
LINES = "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in RECORDS)


def write(path, content):
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def values(*files, text="lines"):
    return [record.value for record in good_records(files, "--input", text)]


FORMS = {
    "a.jsonl": LINES,
    "b.ndjson": LINES.replace("\n", "\r\n"),
    "c.jsonl.gz": LINES.removesuffix("\n"),
    "d.json": json.dumps(RECORDS, indent=1),
    "e.json.gz": json.dumps(RECORDS),
    "f.json": LINES,  # JSON lines under another name, as many datasets have them.
    "g.jsonl": codecs.BOM_UTF8 + LINES.encode(),
    "h.json": codecs.BOM_UTF8 + json.dumps(RECORDS).encode(),
    "i.jsonl": f"\n{LINES}\n  \n",
}


@pytest.fixture(params=[*FORMS, "t.parquet"])
def file(request, tmp_path):
    path = tmp_path / request.param
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
        return path
    return write(path, FORMS[request.param])


def test_every_form_gives_the_same_records(file):
    assert values(file) == RECORDS


def test_every_command_takes_every_form(file):
    """``generate`` has this test with its own rows (``batch/test_rows.py``)."""
    source, data = Source(files=(str(file),)), DataConfig(train=Source(files=("x",)))
    train = [record["text"] for _, record in open_records(source, data, "data.train").read()]
    of_dataset = open_records(Source(dataset=str(file)), data, "data.train")
    evaluated = [document.text for document in read_documents([str(file)], "text")]
    tuned = [prompt.text for prompt in read_prompts([file])]
    counted = [text.removesuffix("\n") for text in _texts(file, "text")]
    assert train == evaluated == tuned == counted == TEXTS
    assert [record["text"] for _, record in of_dataset.read()] == TEXTS


def test_a_text_is_a_document_or_lines(tmp_path):
    text = "one\u2028line\r\n\n \ntwo\x0b\x85\n"
    for name in ("a.txt", "a.txt.gz", "bom.md"):
        content = (codecs.BOM_UTF8 if name == "bom.md" else b"") + text.encode()
        path = write(tmp_path / name, content)
        assert values(path) == ["one\u2028line", "two\x0b\x85"]
        assert values(path, text="document") == [text.replace("\r\n", "\n")]
        assert list(text_lines(path, "--input")) == [
            "one\u2028line\r\n", "\n", " \n", "two\x0b\x85\n"
        ]  # fmt: skip


def test_a_line_that_cannot_be_read_spoils_no_other(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"a": 1}\n{oops\n"\xff"\n' + b"[" * 100_000 + b"\n2\n")
    records = list(read_records([path], "--input", "lines"))
    assert [record.value for record in records if record.error is None] == [{"a": 1}, 2]
    wrong = [(record.where, record.error[:20]) for record in records if record.error]
    assert wrong == [
        (f"{path}, line 2", "this is no JSON (Exp"),
        (f"{path}, line 3", "this is no UTF-8 tex"),
        (f"{path}, line 4", "this is no JSON (max"),
    ]
    with pytest.raises(UserError, match=r"^--input .*a\.jsonl, line 2: this is no JSON"):
        values(path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", "{", "no JSON"),
        ("a.json", '[\n{"a": 1},\n{"a": 2\n]', "no JSON"),
        ("a.json", "[" * 100_000, "no JSON"),
        ("a.json", b"\xff\xfe{", "no UTF-8"),
        ("a.txt", b"\xff", "no UTF-8"),
        ("a.txt", "a".encode("utf-16"), "no UTF-8"),
        ("a.parquet", "no table", "no Parquet file"),
        ("a.parquet", "", "no Parquet file"),
    ],
    ids=lambda value: repr(value)[:20],
)
@pytest.mark.parametrize("text", ["lines", "document"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, says, text):
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=says) as error:
        values(path, text=text)
    assert str(error.value).startswith(f"--input {path}")


@pytest.mark.parametrize(
    "content",
    # Without the time, so that both of pytest's workers name the tests alike.
    [
        b"plain",
        gzip.compress(LINES.encode(), mtime=0)[:-9],
        gzip.compress(b"x" * 99, mtime=0)[:14] + b"zz",
    ],
    ids=["plain", "cut", "broken"],
)
def test_a_damaged_gzip_is_named(tmp_path, content):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.jsonl\.gz"):
        values(path)


def test_a_missing_file_is_named(tmp_path):
    for name in ("a.jsonl", "a.json", "a.txt", "a.parquet"):
        with pytest.raises(UserError, match="No such file"):
            values(tmp_path / name)


def test_parquet_keeps_values_and_nulls(tmp_path):
    day = datetime.datetime(2026, 1, 2, 3, 4, 5, 6)
    table = pyarrow.table({"t": [day, None], "s": [{"a": 1, "b": None}, {"a": None, "b": "x"}]})
    path = tmp_path / "a.parquet"
    parquet.write_table(table, path)
    first, second = values(path)
    assert first == {"t": day, "s": {"a": 1, "b": None}}
    assert without_nulls(second) == {"s": {"b": "x"}}


def test_a_column_that_python_cannot_hold_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    times = pyarrow.array([0, 1000, 1001], pyarrow.time64("ns"))
    days = pyarrow.array([0, 1, 2**30], pyarrow.date32())
    for name, column in (("t", times), ("d", days)):
        parquet.write_table(pyarrow.table({"n": [1, 2, 3], name: column}), path)
        with pytest.raises(UserError, match=rf"^--input .*a\.parquet, column '{name}', row 3: "):
            values(path)
    parquet.write_table(pyarrow.table({"t": times[:2]}), path)
    assert [value["t"].microsecond for value in values(path)] == [0, 1]


def test_two_columns_of_one_name_are_refused(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_arrays([[1], [2]], names=["x", "x"]), path)
    with pytest.raises(UserError, match="several columns of the name 'x'"):
        values(path)


def test_many_rows_of_a_table(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"n": list(range(2500))}), path, row_group_size=700)
    records = list(read_records([path], "--input", "lines"))
    assert [record.value["n"] for record in records] == list(range(2500))
    assert records[2000].where == f"{path}, row 2001"


@pytest.mark.parametrize(
    ("value", "column"), [("\ud83d", ""), ({"body": "a \udc00"}, "body: ")], ids=["text", "field"]
)
def test_half_a_surrogate_pair_is_named_with_row_and_column(tmp_path, value, column):
    path = write(tmp_path / "a.jsonl", f'"good"\n{json.dumps(value)}\n')
    with pytest.raises(UserError) as error:
        read_documents([str(path)], "body")
    start = f"--data {path}, line 2: {column}the text has half of a surrogate pair"
    assert str(error.value).startswith(start)


@pytest.mark.parametrize("value", [3, None, [], {}, {"text": "another field"}, {"body": 3}])
def test_a_record_without_a_text_names_the_field_and_its_option(value, tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps(value))
    (record,) = read_records([path], "--data", "lines")
    with pytest.raises(UserError, match=r"line 1: there is no text.*'body' \(.*--text-field"):
        text_of(record, "--data", "body")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda values: st.lists(values) | st.dictionaries(st.text(), values),
)


@settings(max_examples=30)
@given(st.lists(JSON_VALUES, min_size=1, max_size=5), st.booleans())
def test_what_json_writes_is_read(tmp_path_factory, records, ascii_only):
    folder = tmp_path_factory.mktemp("json")
    lines = "".join(f"{json.dumps(record, ensure_ascii=ascii_only)}\n" for record in records)
    try:
        content = lines.encode()
    except UnicodeEncodeError:
        content = "".join(f"{json.dumps(record)}\n" for record in records).encode()
    assert values(write(folder / "a.jsonl", content)) == records
    assert values(write(folder / "a.json", json.dumps(records))) == records


def test_what_a_tokenizer_takes():
    assert is_unicode("\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"))
    assert not is_unicode("\ud83d")
