# SPDX-License-Identifier: Apache-2.0
"""The result of ``vllm-layerskip eval`` as a JSON file and as tables.

A result is a dictionary of plain values. ``models`` lists each model's ``label`` and ``exits``
(the fields of an ``ExitScore`` each), and of a draft twin what it is (``twin``); the rest says
which data, settings and versions made it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_layerskip.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

Result = Mapping[str, Any]
KIND = "vllm-layerskip eval"


class Metric(NamedTuple):
    key: str
    title: str
    show: Callable[[float], str]


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _perplexity(value: float) -> str:
    """Four digits, so that columns of any size can be compared."""
    if not math.isfinite(value):
        return "inf"
    decimals = max(0, 3 - math.floor(math.log10(value)))
    return f"{value:.{min(decimals, 3)}f}"


METRICS = (
    Metric("perplexity", "perplexity", _perplexity),
    Metric("accuracy", "accuracy", _percent),
    Metric("agreement", "agreement", _percent),
)
_NOTHING = "-"  # One of the models has fewer layers.


def write_json(result: Result, path: Path) -> None:
    """Write a result; an infinite perplexity becomes null, as JSON has no infinity."""
    models = [
        {**model, "exits": [_finite(score) for score in model["exits"]]}
        for model in result["models"]
    ]
    text = json.dumps({**result, "models": models}, indent=2, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _finite(score: Mapping[str, float]) -> dict[str, float | None]:
    return {key: value if math.isfinite(value) else None for key, value in score.items()}


def read_json(path: Path) -> Result:
    """A result that ``write_json`` wrote.

    Raises:
        UserError: the file cannot be read, or is no result.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--from-json {path}: {error}") from None
    if not isinstance(result, dict) or result.get("kind") != KIND:
        raise UserError(
            f"--from-json {path}: this is no result of '{KIND}'. Give a file that --json wrote."
        )
    for model in result["models"]:
        for score in model["exits"]:
            score.update({key: math.inf for key, value in score.items() if value is None})
    return result


def header(result: Result) -> list[str]:
    labels = [model["label"] for model in result["models"]]
    many = len(labels) > 1
    return [
        "layers",
        *(
            f"{label} {metric.title}" if many else metric.title
            for metric in METRICS
            for label in labels
        ),
    ]


def rows(result: Result) -> list[list[str]]:
    """A row for each exit, the models' values of a metric side by side."""
    return [
        [
            str(exit_layer),
            *(
                metric.show(score[metric.key]) if score else _NOTHING
                for metric in METRICS
                for score in scores
            ),
        ]
        for exit_layer, scores in enumerate(
            zip_longest(*(model["exits"] for model in result["models"])), start=1
        )
    ]


def summary(result: Result) -> str:
    """What was measured, in a sentence or two."""
    data, settings = result["data"], result["settings"]
    return (
        f"{data['num_scored_tokens']} tokens of {data['num_documents']} documents "
        f"({', '.join(data['sources'])}; SHA-256 {data['sha256'][:12]}), windows of "
        f"{settings['seq_len']} tokens, stride {settings['stride']}, "
        f"beginning-of-sequence: {settings['bos']}, {settings['dtype']}."
        + "".join(map(_about_twin, result["models"]))
    )


def _about_twin(model: Mapping[str, Any]) -> str:
    twin = model.get("twin")
    if twin is None:
        return ""
    text = (
        f" '{model['label']}' is a draft twin (draft_quantization {twin['draft_quantization']}, "
        f"draft_adapter {twin['draft_adapter'] or 'none'}); its agreement is with the last layer "
        "of the model itself."
    )
    if whole := twin["not_quantized"]:
        text += f" {len(whole)} of its linear layers keep their width, {whole[0]} first."
    return text


def markdown(result: Result) -> str:
    """The table in Markdown, numbers to the right."""
    titles = header(result)
    lines = [titles, ["---:"] * len(titles), *rows(result)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def terminal_table(result: Result) -> Table:
    """The table for a terminal."""
    from rich.table import Table

    table = Table(title="Early exits on held-out text", caption=summary(result))
    for title in header(result):
        table.add_column(title, justify="right")
    for row in rows(result):
        table.add_row(*row)
    return table
