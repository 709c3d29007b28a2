# SPDX-License-Identifier: Apache-2.0
"""A run's plan: everything that can be known and checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_layerskip.errors import UserError
from vllm_layerskip.measuring.hardware import check_device, gpu_info
from vllm_layerskip.measuring.roofline import Roofline
from vllm_layerskip.tuning.check_drafts import check_drafts
from vllm_layerskip.tuning.checkpoint_block import read_config
from vllm_layerskip.tuning.costs import RooflineCosts, find_roofline
from vllm_layerskip.tuning.drafts import Draft
from vllm_layerskip.tuning.engine import Device, draft_vocab_ids, engine_settings
from vllm_layerskip.tuning.grid import DraftCell, Grid, make_grids
from vllm_layerskip.tuning.identity import identity_of, settings_digest
from vllm_layerskip.tuning.jobs import AgreementJob, CellJob, EngineSettings, Workload
from vllm_layerskip.tuning.outputs import Outputs, choose_outputs
from vllm_layerskip.tuning.prompts import (
    EncodedPrompts,
    encode_prompts,
    evenly_spaced,
    read_prompts,
)
from vllm_layerskip.tuning.ray_jobs import RayNodes, connect
from vllm_layerskip.tuning.settings import DEFAULT_MEASURED, MeasuringSettings, TuneSettings


@dataclass(frozen=True)
class TuningPlan:
    """A checked request."""

    settings: TuneSettings
    config: Mapping[str, Any]
    """The checkpoint's config.json."""
    grids: Mapping[Draft, Grid]
    engine: EngineSettings
    workload: Workload
    draft_vocab: tuple[int, ...] | None
    identity: Mapping[str, Any]
    """What measurements depend on."""
    num_too_long: int
    """Prompts that were left out."""
    rooflines: Mapping[Draft, RooflineCosts] | None
    """None: costs are measured."""
    nodes: RayNodes | None
    """None: processes of this machine measure."""
    outputs: Outputs

    @property
    def settings_digest(self) -> str:
        return settings_digest(self.identity)

    @property
    def num_measured(self) -> int:
        return _num_measured(self.settings.measuring)

    def cell_job(self, cells: tuple[DraftCell, ...]) -> CellJob:
        return CellJob(cells, self.engine, self.workload, self.settings_digest)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        return self.workload.batch_sizes

    def agreement_job(self, drafts: Sequence[Draft]) -> AgreementJob:
        generator = self.settings.measuring.generator
        return AgreementJob(
            engine=self.engine,
            workload=self.workload,
            settings_digest=self.settings_digest,
            exits=tuple((draft, self.grids[draft].exit_layers) for draft in drafts),
            draft_vocab=self.draft_vocab,
            generator=generator or ("transformers" if self.rooflines else "vllm"),
        )


def make_plan(settings: TuneSettings) -> TuningPlan:
    """Check everything that can be checked before a model is loaded.

    Raises:
        UserError: an option is wrong; the message names it, its value and what to do.
    """
    _check_counts(settings)
    if settings.ray is None and _loads_the_model(settings.measuring):
        check_device(settings.engine.device)
    config = read_config(settings.model)
    num_layers = _num_layers(settings.model, config)
    adapters = check_drafts(settings.grid, settings.model)
    grids = make_grids(settings.grid, num_layers, adapters)
    grid = next(iter(grids.values()))
    _check_given_agreement(settings, grids)
    _check_answers(settings.prompts.max_tokens, max(grid.num_speculative_tokens))
    prompts = read_prompts(settings.prompts.paths, settings.prompts.text_field)
    outputs = choose_outputs(settings.output, settings.model)
    nodes = connect(settings.ray, settings.engine.device) if settings.ray else None
    device = _device(settings, nodes)
    hardware = settings.measuring.hardware
    roofline = find_roofline(hardware, config, device.dtype) if hardware else None
    encoded = encode_prompts(
        evenly_spaced(prompts, settings.prompts.num_prompts),
        settings.model,
        settings.prompts.max_prompt_tokens,
        settings.prompts.chat,
    )
    draft_vocab = draft_vocab_ids(settings.engine.draft_vocab, settings.model, config)
    engine = engine_settings(settings, config, device, encoded, grid, adapters)
    workload = _workload(settings, encoded, grid)
    machine = nodes.machine if nodes else None
    return TuningPlan(
        settings=settings,
        config=config,
        grids=grids,
        engine=engine,
        workload=workload,
        draft_vocab=draft_vocab,
        identity=identity_of(config, engine, workload, draft_vocab, machine),
        num_too_long=encoded.num_too_long,
        rooflines=_roofline_costs(roofline, settings, encoded, draft_vocab, grids),
        nodes=nodes,
        outputs=outputs,
    )


def _loads_the_model(measuring: MeasuringSettings) -> bool:
    """Whether anything runs on this machine's device."""
    costs_are_measured = measuring.hardware is None or _num_measured(measuring) != 0
    return costs_are_measured or measuring.agreement is None


def _num_measured(measuring: MeasuringSettings) -> int:
    if measuring.num_measured is not None:
        return measuring.num_measured
    return 0 if measuring.hardware else DEFAULT_MEASURED


def _check_counts(settings: TuneSettings) -> None:
    prompts, measuring = settings.prompts, settings.measuring
    for option, value in (
        ("--num-prompts", prompts.num_prompts),
        ("--max-prompt-tokens", prompts.max_prompt_tokens),
        ("--max-tokens", prompts.max_tokens),
        ("--repeats", measuring.repeats),
        ("--rounds", measuring.rounds),
        ("--cells-per-process", measuring.cells_per_process),
    ):
        if value < 1:
            raise UserError(f"{option} {value} must be an integer of at least 1.")


def _num_layers(model: str, config: Mapping[str, Any]) -> int:
    num_layers = config.get("num_hidden_layers")
    if not isinstance(num_layers, int) or num_layers < 2:
        raise UserError(
            f"--model {model}: its config.json has num_hidden_layers={num_layers!r}; a "
            "decoder of at least 2 layers is needed. Give another checkpoint."
        )
    return num_layers


def _check_given_agreement(settings: TuneSettings, grids: Mapping[Draft, Grid]) -> None:
    given = settings.measuring.agreement
    if given is not None and len(grids) > 1:
        raise UserError(
            f"--agreement {given} has the statistics of one draft, and there are {len(grids)}: "
            f"{', '.join(draft.name for draft in grids)}. Leave it out (statistics in --results "
            "are found again), or give one value of --draft-quantization and --draft-adapter."
        )


def _check_answers(max_tokens: int, num_drafts: int) -> None:
    if num_drafts + 2 > max_tokens:
        raise UserError(
            f"--max-tokens {max_tokens} is too small for one step of {num_drafts} drafts. Raise it "
            f"to {num_drafts + 2} or more, or lower --num-speculative-tokens."
        )


def _device(settings: TuneSettings, nodes: RayNodes | None) -> Device:
    if nodes is not None:
        name = nodes.device
    else:
        name = settings.engine.device or ("cuda" if gpu_info() else "cpu")
    return Device(name, settings.engine.dtype or ("float32" if name == "cpu" else "auto"))


def _workload(settings: TuneSettings, prompts: EncodedPrompts, grid: Grid) -> Workload:
    return Workload(
        prompts=prompts.token_ids,
        max_tokens=settings.prompts.max_tokens,
        stop_token_ids=prompts.stop_token_ids,
        batch_sizes=grid.batch_sizes,
        repeats=settings.measuring.repeats,
    )


def _roofline_costs(
    roofline: Roofline | None,
    settings: TuneSettings,
    prompts: EncodedPrompts,
    draft_vocab: Sequence[int] | None,
    drafts: Iterable[Draft],
) -> dict[Draft, RooflineCosts] | None:
    """Costs half-way through the answers, by draft."""
    if roofline is None:
        return None
    context = prompts.mean_length + settings.prompts.max_tokens / 2
    num_ids = None if draft_vocab is None else len(draft_vocab)
    return {
        draft: RooflineCosts(roofline, context, num_ids, draft.quantization) for draft in drafts
    }
