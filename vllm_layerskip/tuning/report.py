# SPDX-License-Identifier: Apache-2.0
"""What a run found, as text for a terminal and as JSON."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from vllm_layerskip.tuning.cells import Measurement, num_equal_outputs
from vllm_layerskip.tuning.drafts import Draft
from vllm_layerskip.tuning.grid import PLAIN, PLAIN_DECODING, DraftCell
from vllm_layerskip.tuning.jobs import EngineSettings
from vllm_layerskip.tuning.predict import Prediction
from vllm_layerskip.tuning.schedule import Choice
from vllm_layerskip.tuning.tune import DraftResult, Result, step_costs
from vllm_layerskip.twins.kinds import NONE

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
    parts = [_agreement_line(of, result.has_twins) for of in result.drafts]
    target_agreement = result.drafts[0].agreement.target_agreement
    if target_agreement < 0.98:
        parts.append(
            f"Warning: in one pass the model says {100 * target_agreement:.1f} % of the "
            "tokens that it generated. If that is no matter of rounding, predictions are off."
        )
    parts += [_costs(result), _speeds(result), _choice(result)]
    return "\n\n".join(parts)


def _agreement_line(of: DraftResult, is_named: bool) -> str:
    agreement = of.agreement
    rates = ", ".join(f"{e}: {100 * agreement.rate(e):.1f}" for e in agreement.exit_layers)
    name = f" ({_name(of.draft)})" if is_named else ""
    return (
        f"Agreement with the target over {agreement.num_tokens} tokens of "
        f"{len(agreement.matches)} answers, % by exit layer{name}:\n  {rates}"
    )


def _name(draft: Draft) -> str:
    return draft.name if draft.has_twin else "own layers"


def _named(result: Result, draft: Draft) -> list[str]:
    """The column that tells drafts apart, where there are twins."""
    return [_name(draft)] if result.has_twins else []


def _costs(result: Result) -> str:
    columns = (
        "batch",
        "plain ms",
        "verify ms",
        "+ K x (draft ms",
        "+ E x layer ms)",
        "worst error",
    )
    body = [
        [
            *_named(result, of.draft),
            str(batch_size),
            *(f"{1e3 * s:.3f}" for s in (c.plain_s, c.verify_s, c.draft_s, c.layer_s)),
            f"{100 * c.worst_error:.1f} %",
        ]
        for of in result.drafts
        for batch_size, c in sorted(step_costs(of.costs).items())
    ]
    if not body:
        return "Costs: by the roofline, without overheads."
    header = [*(["draft"] if result.has_twins else []), *columns]
    return "Costs of a step, fitted to measured ones:\n" + table(header, body)


def _speeds(result: Result) -> str:
    """Measured cells and the best of the others, the fastest prediction first."""
    header = [*(["draft"] if result.has_twins else []),
              "batch", "E", "K", "acceptance", "measured", "tok/s", "measured", "x plain",
              "measured", "outputs = plain"]  # fmt: skip
    body = [
        _speed_row(draft, prediction, result)
        for batch_size in result.batch_sizes
        for draft, prediction in _shown(result, batch_size)
    ]
    return "Predicted (and measured) speed:\n" + table(header, body)


def _shown(result: Result, batch_size: int) -> Iterator[tuple[Draft, Prediction]]:
    predictions = [
        (of.draft, p) for of in result.drafts for p in of.predictions if p.batch_size == batch_size
    ]
    num_only_predicted = 0
    for draft, prediction in sorted(predictions, key=lambda found: -found[1].speedup):
        if result.measurement(DraftCell(draft, prediction.cell), batch_size) is not None:
            yield draft, prediction
        elif num_only_predicted < _NUM_PREDICTED:
            num_only_predicted += 1
            yield draft, prediction


def _speed_row(draft: Draft, prediction: Prediction, result: Result) -> list[str]:
    predicted = _figures(prediction.acceptance_length, prediction.tokens_per_s, prediction.speedup)
    measured, equal = ["-", "-", "-"], "-"
    found = result.measurement(DraftCell(draft, prediction.cell), prediction.batch_size)
    plain = result.measurement(PLAIN_DECODING, prediction.batch_size)
    if found is not None and plain is not None:
        speedup = found.tokens_per_s / plain.tokens_per_s
        measured = _figures(found.acceptance_length, found.tokens_per_s, speedup)
        equal = "{} of {}".format(*num_equal_outputs(found, plain))
    figures = [text for pair in zip(predicted, measured, strict=True) for text in pair]
    names = (prediction.batch_size, *prediction.cell)
    return [*_named(result, draft), *map(str, names), *figures, equal]


def _figures(acceptance_length: float, tokens_per_s: float, speedup: float) -> list[str]:
    return [f"{acceptance_length:.2f}", f"{tokens_per_s:.1f}", f"{speedup:.3f}"]


def _choice(result: Result) -> str:
    choice = result.choice
    speedups = ", ".join(f"{b}: {s:.3f}" for b, s in sorted(choice.speedups.items()))
    draft = f"drafts with {_name(choice.draft)}, " if result.has_twins else ""
    lines = [
        f"Choice: {draft}E = {choice.exit_layer}, K = {choice.num_speculative_tokens}, by batch "
        f"size {[list(entry) for entry in choice.schedule]}.",
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


def serve_line(
    engine: EngineSettings, choice: Choice, written: bool, block: Mapping[str, Any]
) -> str:
    """The ``vllm serve`` command that serves as measured.

    Args:
        written: the checkpoint's config.json has the choice, so that ``auto`` finds it.
        block: the checkpoint's ``layerskip`` block, with the choice in it if it is written.
    """
    command = ["vllm", "serve", engine.model]
    if engine.dtype != "auto":
        command += ["--dtype", engine.dtype]
    if engine.enforce_eager:
        command.append("--enforce-eager")
    adapter = engine.draft_adapters.get(choice.draft.adapter)
    if written:
        command += ["--spec-model", "[self]"]
        if engine.draft_vocab is not None:
            command += ["--draft-vocab", engine.draft_vocab]
        if adapter is not None and "draft_adapter" not in block:
            command += ["--draft-adapter", adapter]
    else:
        config = {"method": "layerskip", **choice.to_dict()}
        # What the checkpoint names would count where the command says nothing.
        if "draft_quantization" in block:
            config["draft_quantization"] = choice.draft.quantization
        if adapter is not None or "draft_adapter" in block:
            config["draft_adapter"] = adapter or NONE
        if engine.draft_vocab is not None:
            config["draft_vocab"] = engine.draft_vocab
        command += ["--speculative-config", json.dumps(config)]
    return shlex.join(command)


def to_dict(
    result: Result,
    identity: Mapping[str, Any],
    provenance: Mapping[str, Any],
    adapters: Mapping[str, str],
) -> dict[str, Any]:
    """Everything of a run, for a JSON file.

    What is found of the target's own layers stands where it stood before there were twins.

    Args:
        adapters: folders of draft adapters by digest.
    """
    own = [_of_draft(of) for of in result.drafts if not of.draft.has_twin]
    return {
        "settings": dict(identity),
        "provenance": dict(provenance),
        "grid": _grid(result),
        **(own[0] if own else {}),
        "twins": [
            {**of.draft._asdict(), "exit_layers": of.grid.exit_layers, **_of_draft(of)}
            for of in result.drafts
            if of.draft.has_twin
        ],
        "adapters": dict(adapters),
        "predictions": [
            {**asdict(prediction), **_in_files(of.draft)}
            for of in result.drafts
            for prediction in of.predictions
        ],
        "measured": [found.to_dict() for found in result.measurements],
        "choice": {
            **result.choice.to_dict(),
            **_in_files(result.choice.draft),
            "speedups": dict(result.choice.speedups),
            "pays": result.choice.pays,
            "basis": result.basis,
        },
    }


def _grid(result: Result) -> dict[str, Any]:
    """The grid, with the exit layers of any draft."""
    exit_layers = sorted({layer for of in result.drafts for layer in of.grid.exit_layers})
    return {**asdict(result.drafts[0].grid), "exit_layers": exit_layers}


def _in_files(draft: Draft) -> dict[str, str]:
    return {"draft_quantization": draft.quantization, "draft_adapter": draft.adapter}


def _of_draft(of: DraftResult) -> dict[str, Any]:
    return {
        "agreement": _agreement(of),
        "costs": {b: asdict(c) for b, c in step_costs(of.costs).items()},
    }


def _agreement(of: DraftResult) -> dict[str, Any]:
    agreement = of.agreement
    lengths = agreement.acceptance_lengths(max(of.grid.num_speculative_tokens))  # [X, K]
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
