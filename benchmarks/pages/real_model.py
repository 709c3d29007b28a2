# SPDX-License-Identifier: Apache-2.0
"""The part of docs/results.md about a real model: a section, with a table for each result file.

Without a file of ``benchmarks/results/real-model`` the page stays as it is. With the first ones the
section is put before all others, and those about the embedded checkpoint become an appendix.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.engines.markdown import markdown
from benchmarks.pages.real_files import RealFile, read_real_files
from benchmarks.pages.sources import source
from benchmarks.pages.tables import ROOT, Tables
from benchmarks.prompts.summary import CategoryResult, batch_size, is_greedy, label, summarize
from benchmarks.prompts.tables import (
    EQUAL,
    equal_answers,
    left_out,
    plain_record,
    position_table,
    speed_columns,
    two_digits,
)

FIGURE = "real-model.svg"
APPENDIX = "## Appendix: the embedded checkpoint"
OF_THE_CHECKPOINT = (
    "The checkpoint",
    "Functions that the model never saw",
    "Spec-Bench",
    "Choosing E and K",
)
"""Headings of the sections that become the appendix."""

_SECTION = re.compile(r"(?m)^(?=## )")

Records = Sequence[dict[str, Any]]


def real_tables(folder: Path) -> Tables:
    """A table for each file."""
    return {file.table: partial(file_tables, file) for file in read_real_files(folder)}


def file_tables(file: RealFile) -> str:
    """All that a file shows, as Markdown."""
    records = file.records
    # In float32 a twin is a reference at full width, so that speeds would say nothing of it.
    has_speeds = file.dtype != "float32"
    parts = [whole_table(records, has_speeds), position_table(records)]
    results = _results(records)
    if len(next(iter(results.values()))) > 1:
        parts += ["Acceptance length:", by_category(results, _acceptance)]
        if has_speeds and batch_size(records[0]) == 1:
            parts += [
                "Speed of decoding, plain's in tokens/s and the others' over it, with the range of "
                "any two runs:",
                speed_table(results),
            ]
    if is_greedy(plain_record(records)):
        parts += _equality(results)
    parts += [left_out(records), _drafts(records), source(_name(file.path), records)]
    return "\n\n".join(part for part in parts if part)


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def _results(records: Records) -> dict[str, list[CategoryResult]]:
    """The results of each mode by its label, plain decoding's first."""
    plain = plain_record(records)
    ordered = [plain, *(record for record in records if record is not plain)]
    return {label(record): summarize(record, plain) for record in ordered}


def whole_table(records: Records, has_speeds: bool) -> str:
    """A row for each mode, over all categories."""
    header = ["mode", "acceptance length"]
    if has_speeds:
        header += ["tokens/s", "x plain", "with prefill"]
    is_compared = is_greedy(plain_record(records))
    header += [EQUAL] if is_compared else []
    body = []
    for mode, of_mode in _results(records).items():
        result = of_mode[-1]
        line = [mode, two_digits(result.acceptance_length)]
        if has_speeds:
            tokens_per_s, speedup = speed_columns(result)
            with_prefill = two_digits(result.speedup) if batch_size(records[0]) == 1 else ""
            line += [tokens_per_s, *(("", "") if mode == "plain" else (speedup, with_prefill))]
        body.append(line + ([equal_answers(result)] if is_compared else []))
    return markdown(header, body)


def by_category(
    results: dict[str, list[CategoryResult]], figure: Callable[[CategoryResult], str]
) -> str:
    """A row for each category, with a column of a figure for each mode but plain decoding."""
    drafting = {mode: of_mode for mode, of_mode in results.items() if mode != "plain"}
    return markdown(
        _header(drafting),
        [
            _row(of_category, map(figure, of_category))
            for of_category in _aligned(drafting.values())
        ],
    )


def speed_table(results: dict[str, list[CategoryResult]]) -> str:
    """As ``by_category``, with plain decoding's tokens/s."""
    body = []
    for of_category in _aligned(results.values()):
        plain, *others = map(speed_columns, of_category)
        body.append(_row(of_category, [plain[0], *(speedup for _, speedup in others)]))
    return markdown(_header(results), body)


def _header(modes: Iterable[str]) -> list[str]:
    return ["category", "questions", "answers", *(m.removeprefix("layerskip, ") for m in modes)]


def _aligned(results: Iterable[Sequence[CategoryResult]]) -> list[tuple[CategoryResult, ...]]:
    """The modes' results of each category that every mode has."""
    found = [{result.category: result for result in of_mode} for of_mode in results]
    if not found:
        return []
    return [
        tuple(of_mode[category] for of_mode in found)
        for category in found[0]
        if all(category in of_mode for of_mode in found)
    ]


def _row(of_category: Sequence[CategoryResult], columns: Iterable[str]) -> list[str]:
    first = of_category[0]
    return [first.category, str(first.num_questions), str(first.num_answers), *columns]


def _acceptance(result: CategoryResult) -> str:
    return two_digits(result.acceptance_length)


def _equality(results: dict[str, list[CategoryResult]]) -> list[str]:
    """Answers that equal plain decoding's by category; a sentence where all do."""
    wholes = [of_mode[-1] for of_mode in results.values()]
    if all(result.num_equal == result.num_answers for result in wholes):
        return [f"All {wholes[0].num_answers} answers of every mode equal plain decoding's."]
    if len(next(iter(results.values()))) == 1:
        return []
    return ["Answers that equal plain decoding's:", by_category(results, equal_answers)]


def _drafts(records: Records) -> str:
    """What the names of drafts mean, without the options that are off."""
    named = {
        record["drafts"]["name"]: record["drafts"]["config"]
        for record in records
        if record.get("drafts") is not None and record["mode"] == "layerskip"
    }
    return "\n".join(
        f"* *{name}*: `{json.dumps({k: v for k, v in config.items() if v != 'none'})}`"
        for name, config in named.items()
    )


def arranged(page: str, folder: Path) -> str:
    """The page with a place for the table of each file."""
    files = read_real_files(folder)
    if not files:
        return page
    if APPENDIX not in page:
        page = _with_section(page, files[0].model)
    missing = [file for file in files if f"<!-- table: {file.table} -->" not in page]
    intro, *sections = _SECTION.split(page)
    sections[0] += "".join(map(_place, missing))
    return intro + "".join(sections)


def _with_section(page: str, model: str) -> str:
    """The page that begins with the model's section and ends with the appendix."""
    intro, *sections = _SECTION.split(page)
    is_appendix = [section[3:].partition("\n")[0] in OF_THE_CHECKPOINT for section in sections]
    appendix = [section for section, moves in zip(sections, is_appendix, strict=True) if moves]
    others = [section for section, moves in zip(sections, is_appendix, strict=True) if not moves]
    if others:
        others[-1] = others[-1].rstrip("\n") + "\n\n"
    demoted = re.sub(r"(?m)^(##+ )", r"#\1", "".join(appendix)).rstrip("\n")
    return f"{intro}{_section(model)}{''.join(others)}{APPENDIX}\n\n{demoted}\n"


def _section(model: str) -> str:
    return (
        f"## {model}\n\n"
        "Real questions to a real model, by category ([protocol](benchmarks.md#real-prompts)).\n\n"
        f"![Acceptance length and speed-up of {model} by category](figures/{FIGURE})\n\n"
    )


def _place(file: RealFile) -> str:
    return f"### {file.heading}\n\n<!-- table: {file.table} -->\n<!-- end of table -->\n\n"
