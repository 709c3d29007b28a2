# SPDX-License-Identifier: Apache-2.0
"""Run jobs of ``worker.py`` as Ray tasks over a cluster; ``process_jobs`` runs them in processes.

Cells are compared with each other and with plain decoding, so all of them must come from equal
machines: tasks go to nodes of one accelerator type, and each says what it ran on. A process serves
one task. On GPUs a task has those of one engine; on CPUs a whole node, since two engines on one
node would slow each other.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_layerskip.errors import UserError, one_line
from vllm_layerskip.files.whole import whole_file
from vllm_layerskip.measuring.cluster import join_ray
from vllm_layerskip.tuning.cells import Measurement
from vllm_layerskip.tuning.jobs import AgreementJob, CellJob
from vllm_layerskip.tuning.process_jobs import worker_environment
from vllm_layerskip.tuning.settings import RaySettings

_TYPE_PREFIX = "accelerator_type:"
_NUM_RETRIES = 2


@dataclass(frozen=True)
class RayNodes:
    """The equal nodes that measure."""

    device: str
    """``cuda`` or ``cpu``."""
    machine: str
    """GPU or CPU model; goes into the digest of the settings."""
    accelerator_type: str | None = None
    cpus_per_task: float = 1

    def task_options(self, num_gpus: int) -> dict[str, Any]:
        """Ray's options for a task whose engine has ``num_gpus`` GPUs."""
        options: dict[str, Any] = {
            "max_calls": 1,
            "max_retries": _NUM_RETRIES,
            "num_cpus": self.cpus_per_task,
            "runtime_env": {"env_vars": worker_environment(self.device)},
        }
        if self.device != "cpu":
            options["num_gpus"] = num_gpus
        if self.accelerator_type is not None:
            options["accelerator_type"] = self.accelerator_type
        return options


def connect(settings: RaySettings, device: str | None) -> RayNodes:
    """Join a Ray cluster, or start one on this machine, and see what it consists of.

    Args:
        device: None for ``cuda`` if there are GPUs.

    Raises:
        UserError: Ray is not installed, there is no cluster, or its nodes are not equal.
    """
    try:
        import ray
    except ImportError:
        raise UserError(
            "--ray: Ray is not installed. Install the extra: pip install 'vllm-layerskip[ray]'"
        ) from None
    join_ray(settings.address)
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = _equal_nodes(resources, device, settings.accelerator_type)
    # The driver's own machine may have no GPU, or another one.
    facts = ray.get(ray.remote(**nodes.task_options(1))(_facts).remote())
    return replace(nodes, machine=facts["machine"])


def _equal_nodes(
    resources: Sequence[Mapping[str, float]], device: str | None, accelerator_type: str | None
) -> RayNodes:
    """The nodes to use, whose machine is not known yet."""
    with_gpus = [node for node in resources if node.get("GPU", 0) >= 1]
    device = device or ("cuda" if with_gpus else "cpu")
    if device != "cpu":
        return RayNodes("cuda", "", one_type(with_gpus, accelerator_type))
    cpus_per_task = min(node["CPU"] for node in resources if node.get("CPU", 0) >= 1)
    return RayNodes("cpu", "", cpus_per_task=cpus_per_task)


def one_type(nodes: Sequence[Mapping[str, float]], wanted: str | None) -> str | None:
    """The accelerator type that tasks ask for.

    Args:
        nodes: resources of the nodes with GPUs.

    Raises:
        UserError: there is none of the wanted type, or several types to choose from.
    """
    if not nodes:
        raise UserError(
            "--ray: the cluster has no GPUs. Use another --ray-address, or --device cpu."
        )
    names = {name for node in nodes for name in node if name.startswith(_TYPE_PREFIX)}
    types = sorted(name.removeprefix(_TYPE_PREFIX) for name in names)
    if wanted is not None:
        if wanted not in types:
            raise UserError(
                f"--accelerator-type {wanted}: the cluster has {', '.join(types) or 'no types'}. "
                "Give one of those."
            )
        return wanted
    if len(types) > 1:
        raise UserError(
            f"--ray: the cluster has {', '.join(types)}, and times of different GPUs cannot be "
            f"compared. Choose one with --accelerator-type, such as {types[0]}."
        )
    return types[0] if types else None


def measure_on_cluster(
    job: CellJob, cells_per_task: int, nodes: RayNodes, identity: Mapping[str, Any]
) -> Iterator[Measurement]:
    """Measure a job's cells, ``cells_per_task`` in each task; measurements come as tasks end.

    Args:
        identity: what all measurements depend on; tasks must agree with its machine, versions and
            code.

    Raises:
        UserError: a task failed, or ran on something else.
    """
    import ray

    task = ray.remote(**nodes.task_options(job.engine.num_gpus))(_work)
    parts = {
        task.remote({"kind": "cells", "job": part.to_dict()}): part
        for part in job.parts(cells_per_task)
    }
    try:
        for reference in _as_they_end(parts):
            cells = ", ".join(map(str, parts[reference].cells))
            results = _result(reference, cells, identity)[0]
            yield from map(Measurement.from_dict, results)
    finally:
        for reference in parts:
            ray.cancel(reference, force=True)


def _as_they_end(references: Iterable[Any]) -> Iterator[Any]:
    import ray

    waiting = list(references)
    while waiting:
        (ended,), waiting = ray.wait(waiting, num_returns=1)
        yield ended


def _result(
    reference: Any, what: str, identity: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Results of a task, and the files that it wrote, by name."""
    import ray

    try:
        facts, results, files = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from None
        cause = f"{type(error.cause).__name__}: {one_line(error.cause)}"
        raise UserError(f"--ray: {what} failed on the cluster: {cause}") from None
    except ray.exceptions.RayError as error:
        raise UserError(
            f"--ray: {what} failed on the cluster, {1 + _NUM_RETRIES} times: {one_line(error)}"
        ) from None
    check_facts(facts, identity, what)
    return results, files


def check_facts(facts: Mapping[str, Any], identity: Mapping[str, Any], what: str) -> None:
    """Check that a task ran on what its measurements say.

    Raises:
        UserError: it did not.
    """
    for name in ("machine", "versions", "code"):
        if facts[name] != identity[name]:
            raise UserError(
                f"--ray: {what} ran with {name} {facts[name]}, and the others with "
                f"{identity[name]}; their times cannot be compared. Use equal nodes with equal "
                "installations (--accelerator-type chooses among GPUs)."
            )


def agreements_on_cluster(
    job: AgreementJob, folder: Path, nodes: RayNodes, identity: Mapping[str, Any]
) -> None:
    """Make a job's agreement statistics on a node of the cluster, in ``folder`` here."""
    import ray

    task = ray.remote(**nodes.task_options(job.engine.num_gpus))(_work)
    request = {"kind": "agreement", "job": job.to_dict()}
    for name, content in _result(task.remote(request), "the agreement pass", identity)[1].items():
        with whole_file(folder / name) as draft:
            draft.write_bytes(content)


def _work(
    request: dict[str, Any],
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, bytes]]:
    """A task: what it ran on, its results, and the files that it wrote, by name."""
    from vllm_layerskip.tuning.worker import results

    with tempfile.TemporaryDirectory() as folder:
        found = list(results({**request, "folder": folder}))
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    return _facts(), found, files


def _facts() -> dict[str, Any]:
    from vllm_layerskip.measuring.provenance import code_digest, versions
    from vllm_layerskip.tuning.identity import this_machine

    return {"machine": this_machine(), "versions": versions(), "code": code_digest()}
