# SPDX-License-Identifier: Apache-2.0
"""A process of its own for whatever loads a model: ``python -m ....worker REQUEST OUTPUT``.

The request is a JSON file; the output has a JSON line for each result, as soon as it is there:

=========  ================================================================================
cells      the request's ``job`` is a ``CellJob``; each line is a measurement
agreement  it is an ``AgreementJob``; a file of statistics for each draft goes to the request's
           ``folder``, and its line says how many tokens they are of
=========  ================================================================================

A mistake of the user is the last line, ``{"user_error": MESSAGE}``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from vllm_layerskip.errors import UserError
from vllm_layerskip.tuning.jobs import USER_ERROR, AgreementJob, CellJob
from vllm_layerskip.tuning.measure import measure_cells


def results(request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Do what a request asks for."""
    if request["kind"] == "cells":
        for measurement in measure_cells(CellJob.from_dict(request["job"])):
            yield measurement.to_dict()
    else:
        from vllm_layerskip.tuning.agreement_job import make_agreements

        yield from make_agreements(AgreementJob.from_dict(request["job"]), Path(request["folder"]))


def main() -> None:
    request_path, output_path = map(Path, sys.argv[1:])
    request = json.loads(request_path.read_text(encoding="utf-8"))
    with output_path.open("a", encoding="utf-8") as output:
        try:
            for result in results(request):
                _write_line(output, result)
        except UserError as error:
            _write_line(output, {USER_ERROR: str(error)})


def _write_line(output: TextIO, result: Mapping[str, Any]) -> None:
    output.write(json.dumps(result) + "\n")
    output.flush()


if __name__ == "__main__":
    main()
