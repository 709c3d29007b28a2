# SPDX-License-Identifier: Apache-2.0
"""Answers from several engines: Ray Data's LLM processor with the plugin.

Ray Data places the replicas, hands them rows, restarts a replica that died and runs its unfinished
rows again. Answers come back to this process. It alone writes, so a row that ran twice is kept
once, and what has been written survives the job. Rows travel as one column of JSON: Ray Data stores
rows in columns and would give every row every other row's keys.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllm_layerskip.batch.one_engine import given_arguments
from vllm_layerskip.batch.output import Answer
from vllm_layerskip.batch.rows import PromptRow
from vllm_layerskip.batch.settings import JobSettings, RayCluster
from vllm_layerskip.chats.chat import chat_token_ids
from vllm_layerskip.errors import UserError
from vllm_layerskip.files.tokenizers import load_tokenizer
from vllm_layerskip.host.engine_start import check_engine, start_mistake
from vllm_layerskip.host.process_output import last_error
from vllm_layerskip.measuring.cluster import join_ray

_OTHER_CPUS = 2
"""For Ray Data's own stages; without them all replicas would wait forever."""
_HANDED_ON = ("TRITON_", "VLLM_", "OMP_", "HF_", "LAYERSKIP_", "TOKENIZERS_")
_OF_THIS_MACHINE = ("_IP", "_PORT", "_RANK", "_HOME", "_CACHE", "_ROOT", "_DIR")


def answers(
    rows: Iterable[PromptRow], settings: JobSettings, cluster: RayCluster
) -> Iterator[Answer]:
    """Generate for all rows on the cluster's replicas.

    Raises:
        UserError: Ray is not installed, or there is no cluster at the address.
    """
    try:
        import ray
        import ray.data.llm  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--num-replicas {cluster.num_replicas}: Ray Data's LLM processor cannot be imported "
            f"({error}). Install the extra: pip install 'vllm-layerskip[ray]'"
        ) from None
    try:
        _join_ray(cluster, settings)
        requests, refused = _requests(rows, settings.model)
        if requests:
            _check_on_a_node(settings, cluster)
            yield from _answers_of_replicas(requests, settings, cluster)
        # A start that fails has no answer.
        yield from refused
    finally:
        ray.shutdown()


def _answers_of_replicas(
    requests: list[dict[str, Any]], settings: JobSettings, cluster: RayCluster
) -> Iterator[Answer]:
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    processor = build_processor(
        vLLMEngineProcessorConfig(**processor_arguments(settings, cluster)),
        preprocess=_to_request,
        postprocess=_to_result,
    )
    # A block for each task: the loss of a replica costs no more than its tasks.
    num_blocks = -(-len(requests) // cluster.rows_per_task)
    dataset = ray.data.from_items(requests, override_num_blocks=num_blocks)
    try:
        for result in processor(dataset).iter_rows():
            yield _answer(result)
    except ray.exceptions.RayError as error:
        # Its text ends with the traceback of the replica that died.
        mistake = start_mistake(last_error(str(error).splitlines()) or "")
        if mistake is None:
            raise
        raise UserError(mistake) from None


def _check_on_a_node(settings: JobSettings, cluster: RayCluster) -> None:
    """Have vLLM check the settings where the replicas are going to run.

    Ray Data would show a user's mistake as two tracebacks of its own, a minute later.

    Raises:
        UserError: a setting is wrong.
    """
    import ray

    gpus = 0 if cluster.device == "cpu" else 1
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_calls=1)(_mistake_in)
    mistake = ray.get(task.remote(settings))
    if mistake is not None:
        raise UserError(mistake)


def _mistake_in(settings: JobSettings) -> str | None:
    given = given_arguments(settings)
    arguments = dict(given.arguments)
    if arguments.get("tensor_parallel_size", 1) != 1:
        # The other GPUs are not this task's; Ray finds them for the engine.
        arguments.setdefault("distributed_executor_backend", "ray")
    try:
        check_engine(replace(given, arguments=arguments))
    except UserError as error:
        return str(error)
    return None


def _join_ray(cluster: RayCluster, settings: JobSettings) -> None:
    """Start or join Ray.

    Raises:
        UserError: there is no cluster at the address, or it has no room for the replicas.
    """
    import ray

    variables = handed_on(os.environ)
    options: dict[str, Any] = {}
    if cluster.device == "cpu" and cluster.address is None:
        options["num_cpus"] = cluster.num_replicas + _OTHER_CPUS
    join_ray(cluster.address, runtime_env={"env_vars": variables}, **options)
    check_room(ray.cluster_resources(), cluster, settings)


def handed_on(variables: Mapping[str, str]) -> dict[str, str]:
    """Environment variables for the replicas, without addresses and folders of this machine."""
    return {
        name: value
        for name, value in variables.items()
        if name.startswith(_HANDED_ON) and not name.endswith(_OF_THIS_MACHINE)
    }


def check_room(resources: Mapping[str, float], cluster: RayCluster, settings: JobSettings) -> None:
    """See that the cluster has room for all replicas; else Ray would wait for nodes forever.

    Raises:
        UserError: it has not.
    """
    size = int(settings.engine_args.get("tensor_parallel_size", 1))
    kind, spare = ("CPU", 1) if cluster.device == "cpu" else ("GPU", 0)
    needed, there = cluster.num_replicas * size + spare, resources.get(kind, 0)
    if there < needed:
        raise UserError(
            f"--num-replicas {cluster.num_replicas}: they need {needed} {kind}s, and the cluster "
            f"has {there:.0f}. Lower it, or use another --ray-address."
        )


def processor_arguments(settings: JobSettings, cluster: RayCluster) -> dict[str, Any]:
    """Arguments of Ray Data's ``vLLMEngineProcessorConfig``."""
    engine = dict(settings.engine_args)
    if settings.speculative_config is not None:
        engine["speculative_config"] = dict(settings.speculative_config)
    arguments: dict[str, Any] = {
        "model_source": settings.model,
        "engine_kwargs": engine,
        # The engine tokenizes and detokenizes, with the model's tokenizer.
        "chat_template_stage": False,
        "tokenize_stage": False,
        "detokenize_stage": False,
        # Ray Data keeps exactly this many: an engine takes long to start.
        "concurrency": (cluster.num_replicas, cluster.num_replicas),
        "batch_size": cluster.rows_per_task,
        "should_continue_on_error": True,
    }
    if cluster.device == "cpu":
        arguments["placement_group_config"] = {"bundle_per_worker": {"CPU": 1}}
    return arguments


def _requests(rows: Iterable[PromptRow], model: str) -> tuple[list[dict[str, Any]], list[Answer]]:
    """Requests for the replicas, and errors of rows whose chat has no prompt."""
    requests: list[dict[str, Any]] = []
    refused: list[Answer] = []
    tokenizer = None
    for row in rows:
        token_ids = row.prompt_token_ids
        if row.messages is not None:
            if tokenizer is None:
                tokenizer = load_tokenizer(model, "--model")
            try:
                token_ids = tuple(chat_token_ids(tokenizer, row.messages, row.tools))
            except ValueError as error:
                refused.append(Answer(row.index, error=f"ValueError: {error}"))
                continue
        request = {
            "prompt": row.prompt,
            "token_ids": token_ids,
            "sampling_params": dict(row.sampling_params),
        }
        requests.append({"index": row.index, "request": request})
    fill_nulls([item["request"]["sampling_params"] for item in requests])
    return [{**item, "request": json.dumps(item["request"])} for item in requests], refused


def fill_nulls(rows: Sequence[dict[str, Any]]) -> None:
    """Replace a parameter that is None by a value that means the same, if other rows have one.

    Between its stages Ray Data holds parameters in columns, and a column of integers with a null
    comes out as floats. The engine drops a request whose seed is one, and Ray waits for it forever.
    """
    same: dict[str, Callable[[], Any]] = {
        "seed": lambda: secrets.randbits(63), "stop": list, "stop_token_ids": list
    }  # fmt: skip
    for name, value in same.items():
        if any(row[name] is not None for row in rows):
            for row in rows:
                if row[name] is None:
                    row[name] = value()


def _to_request(row: dict[str, Any]) -> dict[str, Any]:
    request = json.loads(row["request"])
    prompt = {"prompt": request["prompt"]} if request["token_ids"] is None else {
        "tokenized_prompt": request["token_ids"]
    }  # fmt: skip
    return {**prompt, "sampling_params": request["sampling_params"]}


def _to_result(row: dict[str, Any]) -> dict[str, Any]:
    return {
        name: row[name]
        for name in ("index", "request", "generated_text", "generated_tokens", "num_input_tokens")
    }


def _answer(result: Mapping[str, Any]) -> Answer:
    index, error = int(result["index"]), result.get("__inference_error__")
    if error:
        return Answer(index, error=error)
    token_ids = tuple(map(int, result["generated_tokens"]))
    params = json.loads(result["request"])["sampling_params"]
    return Answer(
        index=index,
        text=result["generated_text"],
        token_ids=token_ids,
        # Ray Data drops vLLM's reason. An answer that ends just at its limit counts as cut.
        finish_reason="length" if len(token_ids) >= params["max_tokens"] else "stop",
        num_prompt_tokens=int(result["num_input_tokens"]),
    )
