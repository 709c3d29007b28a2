# SPDX-License-Identifier: Apache-2.0
"""Run jobs of ``worker.py`` as Ray tasks: what ``jobs.py`` does in processes, over a cluster.

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

from vllm_layerskip.errors import UserError
from vllm_layerskip.evaluation.agreement import Agreement
from vllm_layerskip.tuning.cells import Row
from vllm_layerskip.tuning.jobs import agreement_request, worker_environment
from vllm_layerskip.tuning.measure import CellJob

_TYPE_PREFIX = "accelerator_type:"
_NUM_RETRIES = 2


@dataclass(frozen=True)
class Cluster:
    """The equal nodes that measure."""

    device: str
    """``cuda`` or ``cpu``."""
    machine: str
    """GPU or CPU model; goes into the digest of the settings."""
    accelerator_type: str | None = None
    cpus_per_task: float = 1

    def task_options(self, num_gpus: int) -> dict[str, Any]:
        """Ray's options of a task whose engine has so many GPUs."""
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


def connect(address: str | None, device: str | None, accelerator_type: str | None) -> Cluster:
    """Join a Ray cluster, or start one on this machine, and see what it consists of.

    Args:
        address: None for this machine, or the cluster that ``RAY_ADDRESS`` names.
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
    try:
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False)
    except (ConnectionError, ValueError) as error:
        raise UserError(f"--ray-address {address}: {error}") from None
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    with_gpus = [node for node in resources if node.get("GPU", 0) >= 1]
    device = device or ("cuda" if with_gpus else "cpu")
    if device == "cpu":
        cpus_per_task = min(node["CPU"] for node in resources if node.get("CPU", 0) >= 1)
        cluster = Cluster("cpu", "", cpus_per_task=cpus_per_task)
    else:
        cluster = Cluster("cuda", "", one_type(with_gpus, accelerator_type))
    # The driver's own machine may have no GPU, or another one.
    facts = ray.get(ray.remote(**cluster.task_options(1))(_facts).remote())
    return replace(cluster, machine=facts["machine"])


def one_type(nodes: Sequence[Mapping[str, float]], wanted: str | None) -> str | None:
    """The accelerator type that tasks ask for.

    Args:
        nodes: resources of the nodes with GPUs.

    Raises:
        UserError: there is none of the wanted type, or several types to choose from.
    """
    types = sorted(
        {
            name.removeprefix(_TYPE_PREFIX)
            for node in nodes
            for name in node
            if name.startswith(_TYPE_PREFIX)
        }
    )
    if not nodes:
        raise UserError(
            "--ray: the cluster has no GPUs. Use another --ray-address, or --device cpu."
        )
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
    job: CellJob, cells_per_task: int, cluster: Cluster, identity: Mapping[str, Any]
) -> Iterator[Row]:
    """Measure a job's cells, ``cells_per_task`` in each task, rows as tasks end.

    Args:
        identity: what all rows depend on; tasks must agree with its machine, versions and code.

    Raises:
        UserError: a task failed, or ran on something else.
    """
    import ray

    num_gpus = int(job.engine.engine_args.get("tensor_parallel_size", 1))
    task = ray.remote(**cluster.task_options(num_gpus))(_work)
    cells_of: dict[Any, tuple[tuple[int, int], ...]] = {}
    for start in range(0, len(job.cells), cells_per_task):
        part = replace(job, cells=job.cells[start : start + cells_per_task])
        cells_of[task.remote({"kind": "cells", "job": part.to_dict()})] = part.cells
    try:
        for reference in _as_they_end(cells_of):
            cells = ", ".join(f"E={e} K={k}" for e, k in cells_of[reference])
            yield from (Row(**values) for values in _result(reference, cells, identity))
    finally:
        for reference in cells_of:
            ray.cancel(reference, force=True)


def _as_they_end(references: Iterable[Any]) -> Iterator[Any]:
    import ray

    waiting = list(references)
    while waiting:
        (ended,), waiting = ray.wait(waiting, num_returns=1)
        yield ended


def _result(reference: Any, what: str, identity: Mapping[str, Any]) -> list[dict[str, Any]]:
    import ray

    try:
        facts, results, _ = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise UserError(f"--ray: {what} failed on the cluster: {error.cause!r}") from None
    except ray.exceptions.RayError as error:
        raise UserError(
            f"--ray: {what} failed on the cluster, {1 + _NUM_RETRIES} times: {error}"
        ) from None
    check_facts(facts, identity, what)
    return results


def check_facts(facts: Mapping[str, Any], identity: Mapping[str, Any], what: str) -> None:
    """See that a task ran on what its rows say.

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


def agreement_on_cluster(
    job: CellJob,
    exit_layers: Sequence[int],
    draft_vocab: Sequence[int] | None,
    generator: str,
    path: Path,
    cluster: Cluster,
    identity: Mapping[str, Any],
) -> Agreement:
    """``jobs.agreement_in_process`` on a node of the cluster."""
    import ray

    num_gpus = int(job.engine.engine_args.get("tensor_parallel_size", 1))
    request = agreement_request(job, exit_layers, draft_vocab, generator, Path("agreement.npz"))
    task = ray.remote(**cluster.task_options(num_gpus))(_work)
    reference = task.remote(request)
    _result(reference, "the agreement pass", identity)
    path.write_bytes(ray.get(reference)[2])
    return Agreement.load(path)[0]


def _work(request: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]], bytes]:
    """A task: what it ran on, its results, and the file that it wrote, if any."""
    from vllm_layerskip.tuning.worker import results

    with tempfile.TemporaryDirectory() as folder:
        if "path" in request:
            request = {**request, "path": str(Path(folder, request["path"]))}
        found = list(results(request))
        content = Path(request["path"]).read_bytes() if "path" in request else b""
    return _facts(), found, content


def _facts() -> dict[str, Any]:
    from vllm_layerskip.measuring.hardware import gpu_info
    from vllm_layerskip.measuring.provenance import code_digest, cpu_model, versions

    machine = (gpu_info() or {}).get("name") or cpu_model()
    return {"machine": machine, "versions": versions(), "code": code_digest()}
