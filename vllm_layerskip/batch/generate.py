# SPDX-License-Identifier: Apache-2.0
"""Answer a file of prompts, with one engine in this process or with several that Ray runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

from vllm_layerskip.batch import job, one_engine, ray_data
from vllm_layerskip.batch.folder import check, claim, written_without_answers
from vllm_layerskip.batch.output import Answer
from vllm_layerskip.batch.rows import PromptRow
from vllm_layerskip.batch.settings import (
    BatchSettings,
    JobSettings,
    OutputSettings,
    RayCluster,
    job_settings,
)
from vllm_layerskip.errors import UserError
from vllm_layerskip.files.found import record_files


def generate(settings: BatchSettings) -> job.Summary | None:
    """Answer all rows that an earlier run has not answered, and write the output.

    Returns:
        What this run did; None if the output is there already, and whole.

    Raises:
        UserError: a setting is wrong, the input cannot be read or holds what the output cannot, or
            the folder is not this job's. The folder is as it was.
        RuntimeError: the engines left rows without an answer.
    """
    files, output = record_files(settings.inputs, "--input"), settings.output
    checked = job_settings(settings.engine, settings.sampling_params, files, settings.text_field)
    goes_on = check(output.folder, checked, output.overwrite)
    if goes_on and _is_there(output):
        return None
    return job.run(
        job.Job(
            files,
            checked.sampling_params,
            output.file,
            output.with_token_ids,
            partial(claim, output.folder, checked, output.overwrite),
            goes_on,
            settings.text_field,
        ),
        _generator(checked, settings.cluster),
    )


def _is_there(output: OutputSettings) -> bool:
    """Whether a finished job's output has all that is asked for.

    Raises:
        UserError: it has not, and the answers to write it from are gone.
    """
    as_asked = job.outputs_of(output.folder).get(output.file.name, False) == output.with_token_ids
    if job.is_done(output.folder):
        return as_asked and output.file.exists()
    written = written_without_answers(output.folder)
    if written and not (as_asked and output.file in written):
        what = f"{output.file.name} with{'' if output.with_token_ids else 'out'} token ids"
        raise UserError(
            f"--output {output.folder}: {written[0].name} is there, but the answers that it was "
            f"written from (answers.jsonl) are not, so that {what} cannot be made of them. "
            "--overwrite answers all rows again."
        )
    return bool(written)


def _generator(settings: JobSettings, cluster: RayCluster | None) -> job.Generate:
    def answers(rows: Iterable[PromptRow]) -> Iterator[Answer]:
        if cluster is None:
            return one_engine.answers(rows, settings)
        return ray_data.answers(rows, settings, cluster)

    return answers
