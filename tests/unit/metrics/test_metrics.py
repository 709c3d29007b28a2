# SPDX-License-Identifier: Apache-2.0
"""Catch counts that are lost, doubled or left in vLLM's own statistics on their way from a
worker to /metrics, and series on an engine that did not ask for LayerSkip."""

import copy
import pickle
import types

import prometheus_client
import pytest
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.metrics.stats import IterationStats, SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm_layerskip.metrics import prometheus as metrics
from vllm_layerskip.metrics import step_counts
from vllm_layerskip.metrics.prometheus import PREFIX
from vllm_layerskip.metrics.step_counts import StepCounts, take_step_counts

K = 3
REQUEST = {"method": "layerskip", "exit_layer": 2, "num_speculative_tokens": K}
OURS = {
    f"{PREFIX}num_verify_steps_reused",
    f"{PREFIX}num_verify_steps_full",
    f"{PREFIX}num_draft_tokens_per_pos",
    f"{PREFIX}draft_memory_bytes",
    f"{PREFIX}config_info",
}


def drafted(*lengths):
    """Statistics of a step that verified drafts of these lengths and accepted one of each."""
    stats = SpecDecodingStats.new(K)
    for length in lengths:
        stats.observe_draft(num_draft_tokens=length, num_accepted_tokens=1)
    return stats


class Scheduler:
    """What the wrapper needs of one: the statistics of a step, sent to one of two front ends."""

    def __init__(self):
        self.stats = None

    def update_from_output(self, scheduler_output, model_runner_output):
        return {
            0: EngineCoreOutputs(),
            1: EngineCoreOutputs(scheduler_stats=self.stats),
        }


@pytest.fixture
def scheduler():
    """A scheduler whose class went through ``SchedulerConfig.get_scheduler_cls``."""
    cls = type("OwnScheduler", (Scheduler,), {})
    get_scheduler_cls = step_counts.wrap_get_scheduler_cls(lambda self: cls)
    assert get_scheduler_cls(None) is get_scheduler_cls(None) is cls
    return cls()


def runner_output(*totals):
    """A step's output as the scheduler gets it from a worker process."""
    output = ModelRunnerOutput(req_ids=[], req_id_to_index={})
    if totals:
        setattr(output, step_counts._TOTALS, StepCounts(*totals))
    return pickle.loads(pickle.dumps(output))


def step(scheduler, totals, stats):
    """What one front end takes off the message of a step, after its trip between processes."""
    scheduler.stats = SchedulerStats(spec_decoding_stats=stats) if stats != "off" else None
    messages = scheduler.update_from_output(None, runner_output(*totals))
    assert messages[0].scheduler_stats is None
    encoded = MsgpackEncoder().encode(messages[1])
    message = MsgpackDecoder(EngineCoreOutputs).decode(encoded)
    if message.scheduler_stats is None:
        return StepCounts()
    counts = take_step_counts(message.scheduler_stats, K)
    expected = None if stats is None else stats.num_draft_tokens_per_pos[:K]
    left = message.scheduler_stats.spec_decoding_stats
    assert (left and left.num_draft_tokens_per_pos) == expected
    return counts


def steps(*arguments):
    """The verify steps that ``step`` took off."""
    return step(*arguments)[:2]


def test_memory_is_handed_on_once_and_again_by_a_new_worker(scheduler):
    assert step(scheduler, (1, 0, 64, 4096, 7), drafted(3)) == (1, 0, 64, 4096, 7)
    assert step(scheduler, (2, 0, 64, 4096, 7), drafted(3)) == (1, 0, 0, 0, 0)
    assert step(scheduler, (1, 0, 64, 4096, 7), drafted(3)) == (1, 0, 64, 4096, 7)


def test_a_step_hands_on_what_the_worker_added_since_the_last(scheduler):
    assert steps(scheduler, (1, 0), drafted(3)) == (1, 0)
    assert steps(scheduler, (1, 2), drafted(3, 1)) == (0, 2)
    assert steps(scheduler, (5, 2), drafted(3, 3)) == (4, 0)


def test_steps_without_draft_statistics_are_told_with_the_next(scheduler):
    step(scheduler, (1, 0), drafted(3))
    assert steps(scheduler, (2, 0), None) == (0, 0)
    assert steps(scheduler, (3, 1), "off") == (0, 0)
    assert steps(scheduler, (3, 2), drafted(2)) == (2, 2)


def test_a_worker_that_starts_again_counts_from_zero(scheduler):
    step(scheduler, (7, 4), drafted(3))
    assert steps(scheduler, (2, 1), drafted(3)) == (2, 1)


def test_outputs_without_counts_pass_unchanged(scheduler):
    stats = drafted(3, 2)
    before = copy.deepcopy(stats)
    assert steps(scheduler, (), stats) == (0, 0)
    assert stats == before


def fake_runner(model_state, output):
    class GPUModelRunner:
        def sample_tokens(self, grammar_output):
            return output

    runner = GPUModelRunner()
    runner.model_state = model_state
    return GPUModelRunner, runner


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_workers_output_carries_its_totals(monkeypatch, asynchronous):
    output = ModelRunnerOutput(req_ids=[], req_id_to_index={})
    sent = types.SimpleNamespace(model_runner_output=output) if asynchronous else output
    counts = StepCounts()
    for reused in (True, False, True, True, False, True):
        counts = counts.after_step(reused)
    model_state = types.SimpleNamespace(step_counts=counts)
    runner_cls, runner = fake_runner(model_state, sent)
    module = types.SimpleNamespace(GPUModelRunner=runner_cls)
    monkeypatch.setitem(step_counts.sys.modules, step_counts.MODEL_RUNNER_MODULE, module)
    for _ in range(2):
        step_counts.send_from_workers()
    assert runner.sample_tokens(None) is sent
    assert getattr(output, step_counts._TOTALS)[:2] == (4, 2)


def test_a_plain_engines_output_in_the_same_process_carries_nothing():
    output = ModelRunnerOutput(req_ids=[], req_id_to_index={})
    runner_cls, runner = fake_runner(object(), output)
    step_counts.wrap(runner_cls, "sample_tokens", step_counts._sample_tokens)
    assert runner.sample_tokens(None) is output
    assert not hasattr(output, step_counts._TOTALS)
    runner_cls, runner = fake_runner(object(), None)
    step_counts.wrap(runner_cls, "sample_tokens", step_counts._sample_tokens)
    assert runner.sample_tokens(None) is None


def samples(prefix=PREFIX):
    """Values of the registry's series by name and, where it has them, engine and one label more."""
    return {
        (
            sample.name,
            sample.labels.get("engine"),
            sample.labels.get("position", sample.labels.get("of")),
        ): sample.value
        for metric in prometheus_client.REGISTRY.collect()
        for sample in metric.samples
        if metric.name.startswith(prefix) and not sample.name.endswith("_created")
    }


def names():
    return {
        metric.name
        for metric in prometheus_client.REGISTRY.collect()
        if metric.name.startswith(PREFIX)
    }


def record(manager, stats, counts, engine):
    stats = copy.deepcopy(stats)
    stats.num_draft_tokens_per_pos.extend(StepCounts(*counts))
    manager.record(
        scheduler_stats=SchedulerStats(spec_decoding_stats=stats),
        iteration_stats=IterationStats(),
        engine_idx=engine,
    )


def test_series_of_each_engine_are_what_it_recorded(engine_config):
    manager = StatLoggerManager(engine_config(REQUEST), engine_idxs=[0, 1])
    assert names() == OURS
    assert all(value == 0 for (name, *_), value in samples().items() if name.endswith("_total"))
    record(manager, drafted(3, 3, 1), (1, 0, 0, 4096, 7), engine=0)
    record(manager, drafted(2), (0, 1), engine=1)
    record(manager, drafted(3), (2, 1), engine=0)
    manager.record(SchedulerStats(), None, engine_idx=0)
    manager.record(None, None)
    values = samples()
    for engine, steps, per_position in (("0", (3, 1), (4, 3, 3)), ("1", (0, 1), (1, 1, 0))):
        assert values[f"{PREFIX}num_verify_steps_reused_total", engine, None] == steps[0]
        assert values[f"{PREFIX}num_verify_steps_full_total", engine, None] == steps[1]
        for position, count in enumerate(per_position):
            key = (f"{PREFIX}num_draft_tokens_per_pos_total", engine, str(position))
            assert values[key] == count
        assert values[f"{PREFIX}config_info", engine, None] == 1
    memory = f"{PREFIX}draft_memory_bytes"
    assert values[memory, "0", "twin_layers"] == 4096  # Of the first message, which alone has it.
    assert values[memory, "0", "draft_head"] == 7
    assert values[memory, "0", "exit_states"] == values[memory, "1", "twin_layers"] == 0
    vllms = samples("vllm:spec_decode")
    assert vllms["vllm:spec_decode_num_draft_tokens_total", "0", None] == 10
    assert vllms["vllm:spec_decode_num_drafts_total", "1", None] == 1


def test_vllms_own_loggers_never_see_our_counts(engine_config):
    seen = []

    class OwnLogger:
        def __init__(self, vllm_config, engine_index):
            pass

        def record(self, scheduler_stats, *args, **kwargs):
            seen.append(list(scheduler_stats.spec_decoding_stats.num_draft_tokens_per_pos))

    manager = StatLoggerManager(engine_config(REQUEST), custom_stat_loggers=[OwnLogger])
    record(manager, drafted(3, 1), (1, 1), engine=None)
    assert seen == [[2, 1, 1]]


def test_the_settings_are_labels(engine_config):
    StatLoggerManager(engine_config(REQUEST | {"reuse_exit_states": False}))
    (info,) = (m for m in prometheus_client.REGISTRY.collect() if m.name.endswith("config_info"))
    (sample,) = [s for s in info.samples if s.name.startswith(PREFIX)]
    assert (
        sample.labels.items()
        >= {
            "exit_layer": "2",
            "num_hidden_layers": "4",
            "num_speculative_tokens": "3",
            "reuse_exit_states": "false",
            "draft_vocab_size": "all",
            "vllm_layerskip_version": metrics.__version__,
        }.items()
    )


def test_a_plain_engine_has_vllms_series_alone(engine_config):
    plain = engine_config()
    StatLoggerManager(engine_config(REQUEST))
    assert names() == OURS
    # The series are the process's: they must not outlive their engine there.
    manager = StatLoggerManager(plain)
    assert names() == set()
    assert not hasattr(manager, metrics._LOGGER)
    stats = SchedulerStats(spec_decoding_stats=drafted(3))
    manager.record(stats, None)
    assert stats.spec_decoding_stats == drafted(3)


def test_an_engine_may_be_started_again(engine_config):
    for _ in range(2):
        manager = StatLoggerManager(engine_config(REQUEST))
        record(manager, drafted(3), (1, 0), engine=None)
    assert samples()[f"{PREFIX}num_verify_steps_reused_total", "0", None] == 1
