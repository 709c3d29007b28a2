# SPDX-License-Identifier: Apache-2.0
"""What a run found, as text for a terminal and as JSON."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from vllm_layerskip.config.options import SCHEDULE
from vllm_layerskip.tuning.cells import PLAIN, Row, num_equal_outputs
from vllm_layerskip.tuning.schedule import Choice
from vllm_layerskip.tuning.tune import Result, step_costs

_NUM_PREDICTED = 5


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
    parts += [_costs(result), _cells(result), _choice(result)]
    return "\n\n".join(part for part in parts if part)


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


def _cells(result: Result) -> str:
    """Predicted against measured, and the best of what was predicted only."""
    header = ("batch", "E", "K", "acceptance", "measured", "tok/s", "measured", "x plain",
              "measured", "outputs = plain")  # fmt: skip
    body = []
    for batch_size in result.grid.batch_sizes:
        predicted = [p for p in result.predictions if p.batch_size == batch_size]
        predicted.sort(key=lambda p: -p.speedup)
        shown = 0
        for p in predicted:
            row = result.row((p.exit_layer, p.num_speculative_tokens), batch_size)
            shown += row is None
            if row is None and shown > _NUM_PREDICTED:
                continue
            plain = result.row(PLAIN, batch_size)
            values = [f"{p.acceptance_length:.2f}", f"{p.tokens_per_s:.1f}", f"{p.speedup:.3f}"]
            seen, equal = ["-", "-", "-"], "-"
            if row is not None and plain is not None:
                ratio = row.tokens_per_s / plain.tokens_per_s
                seen = [f"{row.acceptance_length:.2f}", f"{row.tokens_per_s:.1f}", f"{ratio:.3f}"]
                equal = "{} of {}".format(*num_equal_outputs(row, plain))
            pairs = [text for pair in zip(values, seen, strict=True) for text in pair]
            body.append(
                [str(batch_size), str(p.exit_layer), str(p.num_speculative_tokens), *pairs, equal]
            )
    return "Predicted (and measured) speed:\n" + table(header, body)


def _choice(result: Result) -> str:
    choice = result.choice
    basis = "measured" if result.measured_speedups else "predicted"
    speedups = ", ".join(f"{b}: {s:.3f}" for b, s in sorted(choice.speedups.items()))
    lines = [
        f"Choice: E = {choice.exit_layer}, K = {choice.num_speculative_tokens}, by batch size "
        f"{[list(entry) for entry in choice.schedule]}.",
        f"Speed-up over plain decoding ({basis}) by batch size: {speedups}.",
    ]
    if not choice.pays:
        lines.append(
            "Drafting does not pay here: no pair is faster than plain decoding. The schedule says "
            "0 drafts, so `auto` decodes plainly; the pair is the one that loses the least."
        )
    return "\n".join(lines)


def differing_outputs(rows: Sequence[Row]) -> list[Row]:
    """Rows with an output that is not plain decoding's."""
    plain = {row.batch_size: row for row in rows if row.cell == PLAIN}
    found = []
    for row in rows:
        if row.cell != PLAIN and row.batch_size in plain:
            equal, num_prompts = num_equal_outputs(row, plain[row.batch_size])
            if equal != num_prompts:
                found.append(row)
    return found


def serve_line(
    model: str,
    choice: Choice,
    written: bool,
    dtype: str,
    enforce_eager: bool,
    draft_vocab: str | None,
) -> str:
    """The ``vllm serve`` command that serves as measured.

    Args:
        written: the checkpoint's config.json has the choice, so that ``auto`` finds it.
    """
    command = ["vllm", "serve", model]
    if dtype != "auto":
        command += ["--dtype", dtype]
    if enforce_eager:
        command.append("--enforce-eager")
    if written:
        command += ["--spec-model", "[self]"]
        if draft_vocab is not None:
            command += ["--draft-vocab", draft_vocab]
    else:
        config: dict[str, Any] = {
            "method": "layerskip",
            "exit_layer": choice.exit_layer,
            "num_speculative_tokens": choice.num_speculative_tokens,
            SCHEDULE: [list(entry) for entry in choice.schedule],
        }
        if draft_vocab is not None:
            config["draft_vocab"] = draft_vocab
        command += ["--speculative-config", json.dumps(config)]
    return shlex.join(command)


def to_dict(result: Result, identity: Mapping[str, Any], provenance: Mapping[str, Any]) -> dict:
    """Everything of a run, for a JSON file."""
    choice = result.choice
    lengths = result.agreement.acceptance_lengths(max(result.grid.num_speculative_tokens))
    return {
        "settings": dict(identity),
        "provenance": dict(provenance),
        "grid": asdict(result.grid),
        "agreement": {
            "num_tokens": result.agreement.num_tokens,
            "num_answers": len(result.agreement.matches),
            "target_agreement": result.agreement.target_agreement,
            "rates": {e: round(result.agreement.rate(e), 4) for e in result.agreement.exit_layers},
            "acceptance_lengths": {
                e: [round(float(length), 4) for length in lengths[index]]
                for index, e in enumerate(result.agreement.exit_layers)
            },
        },
        "costs": {b: asdict(c) for b, c in step_costs(result.costs).items()},
        "predictions": [asdict(prediction) for prediction in result.predictions],
        "measured": [asdict(row) for row in result.rows],
        "choice": {
            "exit_layer": choice.exit_layer,
            "num_speculative_tokens": choice.num_speculative_tokens,
            SCHEDULE: [list(entry) for entry in choice.schedule],
            "speedups": dict(choice.speedups),
            "pays": choice.pays,
            "basis": "measured" if result.measured_speedups else "predicted",
        },
    }
