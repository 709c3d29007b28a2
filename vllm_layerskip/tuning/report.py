# SPDX-License-Identifier: Apache-2.0
"""What a run found, as text for a terminal and as JSON."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from vllm_layerskip.tuning.cells import Measurement, num_equal_outputs
from vllm_layerskip.tuning.grid import PLAIN
from vllm_layerskip.tuning.jobs import EngineSettings
from vllm_layerskip.tuning.predict import Prediction
from vllm_layerskip.tuning.schedule import Choice
from vllm_layerskip.tuning.tune import Result, step_costs

_NUM_PREDICTED = 5
"""Cells to show a batch size besides those that were measured."""


def table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Columns flush right, two spaces between them."""
    lines = [header, *body]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True))
        for line in lines
    )


def text_report(result: Result) -> str:
    """Agreement, costs, predicted against measured, and the choice."""
    agreement = result.agreement
    rates = ", ".join(f"{e}: {100 * agreement.rate(e):.1f}" for e in agreement.exit_layers)
    parts = [
        f"Agreement with the target over {agreement.num_tokens} tokens of "
        f"{len(agreement.matches)} answers, % by exit layer:\n  {rates}"
    ]
    if agreement.target_agreement < 0.98:
        parts.append(
            f"Warning: in one pass the model says {100 * agreement.target_agreement:.1f} % of the "
            "tokens that it generated. If that is no matter of rounding, predictions are off."
        )
    parts += [_costs(result), _speeds(result), _choice(result)]
    return "\n\n".join(parts)


def _costs(result: Result) -> str:
    costs = step_costs(result.costs)
    if not costs:
        return "Costs: by the roofline, without overheads."
    header = ("batch", "plain ms", "verify ms", "+ K x (draft ms", "+ E x layer ms)", "worst error")
    body = [
        [
            str(batch_size),
            *(f"{1e3 * s:.3f}" for s in (c.plain_s, c.verify_s, c.draft_s, c.layer_s)),
            f"{100 * c.worst_error:.1f} %",
        ]
        for batch_size, c in sorted(costs.items())
    ]
    return "Costs of a step, fitted to measured ones:\n" + table(header, body)


def _speeds(result: Result) -> str:
    """Measured cells and the best of the others, the fastest prediction first."""
    header = ("batch", "E", "K", "acceptance", "measured", "tok/s", "measured", "x plain",
              "measured", "outputs = plain")  # fmt: skip
    body = [
        _speed_row(prediction, result)
        for batch_size in result.grid.batch_sizes
        for prediction in _shown(result, batch_size)
    ]
    return "Predicted (and measured) speed:\n" + table(header, body)


def _shown(result: Result, batch_size: int) -> Iterator[Prediction]:
    predictions = [p for p in result.predictions if p.batch_size == batch_size]
    num_only_predicted = 0
    for prediction in sorted(predictions, key=lambda p: -p.speedup):
        if result.measurement(prediction.cell, batch_size) is not None:
            yield prediction
        elif num_only_predicted < _NUM_PREDICTED:
            num_only_predicted += 1
            yield prediction


def _speed_row(prediction: Prediction, result: Result) -> list[str]:
    predicted = _figures(prediction.acceptance_length, prediction.tokens_per_s, prediction.speedup)
    measured, equal = ["-", "-", "-"], "-"
    found = result.measurement(prediction.cell, prediction.batch_size)
    plain = result.measurement(PLAIN, prediction.batch_size)
    if found is not None and plain is not None:
        speedup = found.tokens_per_s / plain.tokens_per_s
        measured = _figures(found.acceptance_length, found.tokens_per_s, speedup)
        equal = "{} of {}".format(*num_equal_outputs(found, plain))
    figures = [text for pair in zip(predicted, measured, strict=True) for text in pair]
    names = (prediction.batch_size, *prediction.cell)
    return [*map(str, names), *figures, equal]


def _figures(acceptance_length: float, tokens_per_s: float, speedup: float) -> list[str]:
    return [f"{acceptance_length:.2f}", f"{tokens_per_s:.1f}", f"{speedup:.3f}"]


def _choice(result: Result) -> str:
    choice = result.choice
    speedups = ", ".join(f"{b}: {s:.3f}" for b, s in sorted(choice.speedups.items()))
    lines = [
        f"Choice: E = {choice.exit_layer}, K = {choice.num_speculative_tokens}, by batch size "
        f"{[list(entry) for entry in choice.schedule]}.",
        f"Speed-up over plain decoding ({result.basis}) by batch size: {speedups}.",
    ]
    if not choice.pays:
        lines.append(
            "Drafting does not pay here: no pair is faster than plain decoding. The schedule says "
            "0 drafts, so `auto` decodes plainly; the pair is the one that loses the least."
        )
    return "\n".join(lines)


def differing_outputs(measurements: Sequence[Measurement]) -> list[Measurement]:
    """Those with an output that is not plain decoding's."""
    plain = {found.batch_size: found for found in measurements if found.cell == PLAIN}
    return [
        found
        for found in measurements
        if found.batch_size in plain and not _equals(found, plain[found.batch_size])
    ]


def _equals(found: Measurement, plain: Measurement) -> bool:
    num_equal, num_prompts = num_equal_outputs(found, plain)
    return num_equal == num_prompts


def serve_line(engine: EngineSettings, choice: Choice, written: bool) -> str:
    """The ``vllm serve`` command that serves as measured.

    Args:
        written: the checkpoint's config.json has the choice, so that ``auto`` finds it.
    """
    command = ["vllm", "serve", engine.model]
    if engine.dtype != "auto":
        command += ["--dtype", engine.dtype]
    if engine.enforce_eager:
        command.append("--enforce-eager")
    if written:
        command += ["--spec-model", "[self]"]
        if engine.draft_vocab is not None:
            command += ["--draft-vocab", engine.draft_vocab]
    else:
        config: dict[str, Any] = {"method": "layerskip", **choice.to_dict()}
        if engine.draft_vocab is not None:
            config["draft_vocab"] = engine.draft_vocab
        command += ["--speculative-config", json.dumps(config)]
    return shlex.join(command)


def to_dict(
    result: Result, identity: Mapping[str, Any], provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything of a run, for a JSON file."""
    return {
        "settings": dict(identity),
        "provenance": dict(provenance),
        "grid": asdict(result.grid),
        "agreement": _agreement(result),
        "costs": {b: asdict(c) for b, c in step_costs(result.costs).items()},
        "predictions": [asdict(prediction) for prediction in result.predictions],
        "measured": [found.to_dict() for found in result.measurements],
        "choice": {
            **result.choice.to_dict(),
            "speedups": dict(result.choice.speedups),
            "pays": result.choice.pays,
            "basis": result.basis,
        },
    }


def _agreement(result: Result) -> dict[str, Any]:
    agreement = result.agreement
    lengths = agreement.acceptance_lengths(max(result.grid.num_speculative_tokens))  # [X, K]
    return {
        "num_tokens": agreement.num_tokens,
        "num_answers": len(agreement.matches),
        "target_agreement": agreement.target_agreement,
        "rates": {e: round(agreement.rate(e), 4) for e in agreement.exit_layers},
        "acceptance_lengths": {
            e: [round(float(length), 4) for length in row]
            for e, row in zip(agreement.exit_layers, lengths, strict=True)
        },
    }
