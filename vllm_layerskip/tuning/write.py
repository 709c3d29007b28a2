# SPDX-License-Identifier: Apache-2.0
"""Write what a run found: report, map, and the checkpoint's ``layerskip`` block."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_layerskip.files.whole import write_json
from vllm_layerskip.tuning.checkpoint_block import path_in_checkpoint, tuned_block, write_config
from vllm_layerskip.tuning.plan import TuningPlan
from vllm_layerskip.tuning.plot import draw_map
from vllm_layerskip.tuning.report import to_dict
from vllm_layerskip.tuning.tune import Result


def write_report(plan: TuningPlan, result: Result, facts: Mapping[str, Any]) -> None:
    """Write the report and the map.

    Args:
        facts: ``provenance()`` of the run.
    """
    report = to_dict(result, plan.identity, facts, plan.engine.draft_adapters)
    write_json(plan.outputs.report, report)
    draw_map(result, plan.outputs.map)


def chosen_block(plan: TuningPlan, result: Result, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint's ``layerskip`` block with the choice, and what it was found with."""
    tuning = {
        "basis": result.basis,
        "device": (facts["gpu"] or {}).get("name") or facts["cpu"]["model"],
        "dtype": plan.engine.dtype,
        "speedups": {str(size): round(s, 3) for size, s in result.choice.speedups.items()},
        "versions": facts["versions"],
        "time": facts["time"],
    }
    folder = plan.engine.draft_adapters.get(result.choice.draft.adapter)
    adapter = None if folder is None else path_in_checkpoint(plan.engine.model, folder)
    return tuned_block(plan.config.get("layerskip"), result.choice, tuning, adapter)


def write_block(plan: TuningPlan, path: Path, block: Mapping[str, Any]) -> Path | None:
    """Write the checkpoint's config.json with ``block`` in it to ``path``.

    Returns:
        The copy of what was there before, if there is one.

    Raises:
        UserError: it cannot be written.
    """
    config = {**plan.config, "layerskip": block}
    return write_config(path, config, backup=plan.outputs.into_checkpoint)
