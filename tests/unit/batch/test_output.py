# SPDX-License-Identifier: Apache-2.0
"""Catch an output file that is not whole."""

from __future__ import annotations

import pytest

from vllm_layerskip.batch.output import write_output


def test_a_failed_write_leaves_no_output(tmp_path):
    def records():
        yield {"a": 1}
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_output(tmp_path / "output.jsonl", records())
    assert list(tmp_path.iterdir()) == []
