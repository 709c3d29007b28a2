# SPDX-License-Identifier: Apache-2.0
"""Answer a file of prompts, with one engine in this process or with several that Ray runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vllm_layerskip.batch import job, one_engine, ray_data
from vllm_layerskip.batch.folder import claim, clear
from vllm_layerskip.batch.output import Answer
from vllm_layerskip.batch.rows import PromptRow, input_files
from vllm_layerskip.batch.settings import BatchSettings, JobSettings, RayCluster, job_settings


def generate(settings: BatchSettings) -> job.Summary | None:
    """Answer all rows that an earlier run has not answered.

    Returns:
        What this run did; None if the output is there already, and whole.

    Raises:
        UserError: a setting is wrong, the input cannot be read, or the folder is not this job's.
        RuntimeError: the engines left rows without an answer.
    """
    files, output = input_files(settings.inputs), settings.output
    checked = job_settings(settings.engine, settings.sampling_params, files)
    if output.overwrite:
        clear(output.folder)
    goes_on = claim(output.folder, checked)
    if goes_on and output.file.exists():
        return None
    return job.run(
        job.Job(files, checked.sampling_params, output.file, output.with_token_ids),
        _generator(checked, settings.cluster),
    )


def _generator(settings: JobSettings, cluster: RayCluster | None) -> job.Generate:
    def answers(rows: Iterable[PromptRow]) -> Iterator[Answer]:
        if cluster is None:
            return one_engine.answers(rows, settings)
        return ray_data.answers(rows, settings, cluster)

    return answers
