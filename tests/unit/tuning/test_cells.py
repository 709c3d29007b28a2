# SPDX-License-Identifier: Apache-2.0
"""Catch a measured cell that gets lost, is mixed with other settings', or breaks its file."""

from dataclasses import replace

import pytest

from vllm_layerskip.errors import UserError
from vllm_layerskip.tuning.cells import (
    Measurement,
    append_measurements,
    load_measurements,
    num_equal_outputs,
    output_digest,
)
from vllm_layerskip.tuning.drafts import OWN, Draft
from vllm_layerskip.tuning.grid import PLAIN_DECODING, DraftCell, Grid
from vllm_layerskip.tuning.identity import settings_digest
from vllm_layerskip.tuning.measured_cells import MeasuredCells

ONE = Measurement("s1", 3, 5, 1, 123.456, 7.125, 2.5, 40, 60, 41, "120.10 123.46", "aa bb", 4.5)
GRID = Grid((3, 4), (5,), (1, 2))
E3, E4, E5 = (DraftCell(OWN, (e, 5)) for e in (3, 4, 5))


def test_rows_are_read_back_and_a_header_is_written_once(tmp_path):
    path = tmp_path / "new" / "cells.csv"
    append_measurements(path, [ONE])
    append_measurements(path, [replace(ONE, batch_size=2), replace(ONE, exit_layer=4)])
    assert load_measurements(path) == [ONE, replace(ONE, batch_size=2), replace(ONE, exit_layer=4)]
    assert path.read_text().count("settings,") == 1


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_line_that_a_crash_cut_off_goes_and_the_rest_stays(tmp_path, cut):
    path = tmp_path / "cells.csv"
    append_measurements(path, [ONE, replace(ONE, batch_size=2)])
    path.write_bytes(path.read_bytes()[:-cut])
    assert load_measurements(path) == [ONE]
    append_measurements(path, [replace(ONE, batch_size=4)])
    assert load_measurements(path) == [ONE, replace(ONE, batch_size=4)]
    assert len(path.read_text().splitlines()) == 3


def test_a_cut_off_header_is_no_file_yet(tmp_path):
    path = tmp_path / "cells.csv"
    path.write_text("settings,exit_l")
    assert load_measurements(path) == []
    append_measurements(path, [ONE])
    assert load_measurements(path) == [ONE]


def test_a_mangled_line_in_the_middle_is_not_used(tmp_path):
    path = tmp_path / "cells.csv"
    append_measurements(path, [ONE, replace(ONE, batch_size=2)])
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[1].replace("123.456", "fast"), lines[2]]))
    assert load_measurements(path) == [replace(ONE, batch_size=2)]


@pytest.mark.parametrize("content", ["a,b\n1,2\n", "hello\nthere", b"\xff\n"])
def test_another_file_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "cells.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = path.read_bytes()
    with pytest.raises(UserError, match="--results"):
        load_measurements(path)
    assert path.read_bytes() == before


def row_of(cell, **values):
    draft, (exit_layer, num_drafts) = cell
    return replace(
        ONE, exit_layer=exit_layer, num_speculative_tokens=num_drafts,
        draft_quantization=draft.quantization, draft_adapter=draft.adapter, **values,
    )  # fmt: skip


def _measured(cells, digest="s1"):
    for cell in cells:
        for batch_size in GRID.batch_sizes:
            e = cell.cell[0]
            speed = 100.0 if cell == PLAIN_DECODING else 100.0 * e * batch_size
            yield row_of(cell, settings_digest=digest, batch_size=batch_size, tokens_per_s=speed)


def test_only_missing_cells_of_the_same_settings_are_measured(tmp_path):
    path = tmp_path / "cells.csv"
    append_measurements(
        path, [*_measured([PLAIN_DECODING, E3], "other"), *_measured([PLAIN_DECODING])]
    )
    append_measurements(path, list(_measured([E3]))[:1])  # Batch size 2 is missing.
    asked = []

    def measure(cells):
        asked.extend(cells)
        return _measured(cells)

    measured = MeasuredCells(path, "s1", GRID.batch_sizes)
    measured.measure([PLAIN_DECODING, E3, E4], measure)
    assert asked == [E3, E4]
    measured.measure([PLAIN_DECODING, E3, E4], measure)
    assert len(asked) == 2
    again = MeasuredCells(path, "s1", GRID.batch_sizes)
    assert again.missing([PLAIN_DECODING, E3, E4]) == []
    assert again.speedups(OWN, GRID) == {
        (3, 5, 1): 3.0, (3, 5, 2): 6.0, (4, 5, 1): 4.0, (4, 5, 2): 8.0
    }  # fmt: skip
    assert sum(found.settings_digest == "other" for found in load_measurements(path)) == 4


def test_what_was_measured_before_an_interruption_stays(tmp_path):
    path = tmp_path / "cells.csv"

    def interrupted(cells):
        yield from list(_measured(cells))[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        MeasuredCells(path, "s1", GRID.batch_sizes).measure([PLAIN_DECODING, E3], interrupted)
    measured = MeasuredCells(path, "s1", GRID.batch_sizes)
    assert len(measured.fastest) == 3
    assert measured.missing([PLAIN_DECODING, E3]) == [E3]


def test_settings_that_differ_in_anything_have_another_digest():
    settings = {"model": "a", "load": {"max_tokens": 5}}
    assert settings_digest(settings) == settings_digest(dict(reversed(settings.items())))
    assert settings_digest(settings) != settings_digest({"model": "a", "load": {"max_tokens": 6}})


OLD = """settings,exit_layer,num_speculative_tokens,batch_size,tokens_per_s,step_ms,\
acceptance_length,num_drafts,num_accepted_tokens,num_steps,runs_tokens_per_s,outputs,start_s
s1,3,5,1,123.456,7.125,2.5,40,60,41,120.10 123.46,aa bb,4.5
s1,4,5,1,123.456,7.125,2.5,40,60,41,120.10 12"""


def test_a_file_from_before_there_were_twins_is_read_and_gone_on_with(tmp_path):
    path = tmp_path / "cells.csv"
    path.write_text(OLD)
    assert load_measurements(path) == [ONE]
    assert path.read_text() == OLD
    twin = replace(ONE, draft_quantization="int4", draft_adapter="abc")
    append_measurements(path, [twin])
    assert load_measurements(path) == [ONE, twin]
    assert len(path.read_text().splitlines()) == 3
    old = {name: value for name, value in ONE.to_dict().items() if "draft_" not in name}
    assert Measurement.from_dict({**old, "num_drafts": 40}) == ONE


def test_drafts_are_kept_apart(tmp_path):
    """The same E and K of another kind, or of another adapter, is another cell."""
    path, cell = tmp_path / "cells.csv", (3, 5)
    drafts = [OWN, Draft("int4"), Draft("int8"), Draft("int4", "abc"), Draft("int4", "abd")]
    append_measurements(path, [
        row_of(PLAIN_DECODING, tokens_per_s=10.0),
        *(row_of(DraftCell(d, cell), tokens_per_s=20.0 + i) for i, d in enumerate(drafts[:4])),
    ])  # fmt: skip
    measured = MeasuredCells(path, "s1", [1])
    assert measured.missing([DraftCell(d, cell) for d in drafts]) == [DraftCell(drafts[4], cell)]
    grid = Grid((3,), (5,), (1,))
    assert [measured.speedups(d, grid) for d in drafts] == [
        {(3, 5, 1): 2.0}, {(3, 5, 1): 2.1}, {(3, 5, 1): 2.2}, {(3, 5, 1): 2.3}, {}
    ]  # fmt: skip


def test_outputs_are_compared_prompt_by_prompt():
    digests = [output_digest(ids) for ids in ([1, 2], [3], [])]
    plain = replace(ONE, outputs=" ".join(digests))
    assert num_equal_outputs(plain, plain) == (3, 3)
    other = replace(ONE, outputs=" ".join([digests[0], output_digest([4]), digests[2]]))
    assert num_equal_outputs(other, plain) == (2, 3)


def test_rounds_take_turns_and_the_fastest_counts(tmp_path):
    path, order = tmp_path / "cells.csv", []
    speeds = {PLAIN_DECODING: [10.0, 9.0, 11.0], E3: [12.0, 20.0, 15.0]}

    def measure(cells):
        for cell in cells:
            speed = speeds[cell][order.count(cell)]
            order.append(cell)
            yield row_of(cell, tokens_per_s=speed)

    measured = MeasuredCells(path, "s1", [1], rounds=3)
    measured.measure([PLAIN_DECODING, E3], measure)
    assert order == [PLAIN_DECODING, E3] * 3
    assert measured.speedups(OWN, Grid((3,), (5,), (1,))) == {(3, 5, 1): pytest.approx(20 / 11)}
    more = MeasuredCells(path, "s1", [1], rounds=4)
    assert not more.missing([PLAIN_DECODING, E3], 3)
    assert more.missing([PLAIN_DECODING, E3], 4) == [PLAIN_DECODING, E3]


def test_cells_that_are_far_behind_drop_out_after_two_rounds(tmp_path):
    speeds = {PLAIN_DECODING: 1.0, E3: 20.0, E4: 13.9, E5: 14.1}
    asked = []

    def measure(cells):
        asked.append(list(cells))
        for cell in cells:
            yield row_of(cell, tokens_per_s=speeds[cell])

    MeasuredCells(tmp_path / "cells.csv", "s1", [1], rounds=3).measure(list(speeds), measure)
    assert asked == [list(speeds), list(speeds), [PLAIN_DECODING, E3, E5]]
