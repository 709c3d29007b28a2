# SPDX-License-Identifier: Apache-2.0
"""The benchmark tool's formulas, files and tables; tests/engine/test_benchmarks.py runs it."""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.decode import (
    compare,
    limits,
    plots,
    prompts,
    report,
    summary,
)
from benchmarks.engines import (
    presets,
    results,
)
from benchmarks.engines.arguments import command_line_flags, engine_arguments
from benchmarks.engines.cut_checkpoint import write_cut_checkpoint
from benchmarks.engines.modes import VLLM_MODES, Speculation, speculative_config
from benchmarks.engines.settings import Settings, add_arguments, settings_from
from benchmarks.serve import bench as serve_bench
from vllm_layerskip.measuring import hardware
from vllm_layerskip.measuring.roofline import BYTES_ONLY, Decoding, Roofline, scheduled_drafts
from vllm_layerskip.measuring.shapes import SHAPES, Shape
from vllm_layerskip.measuring.timing import Step, steady_window

ROOT = Path(__file__).parents[3]

EMBEDDED = Path(__file__).parents[3] / "vllm_layerskip" / "checkpoint"
H200 = hardware.GPUS["NVIDIA H200"]


class TestShapes:
    @pytest.mark.parametrize(
        ("name", "num_weights"),
        [  # As the models' cards state them.
            ("llama-2-7b", 6.74e9),
            ("llama-2-13b", 13.02e9),
            ("llama-3-8b", 8.03e9),
            ("llama-3.2-1b", 1.236e9),
        ],
    )
    def test_sizes_are_the_published_ones(self, name, num_weights):
        assert SHAPES[name].num_weights == pytest.approx(num_weights, rel=1e-3)

    @pytest.mark.parametrize("name", SHAPES)
    def test_a_written_config_is_read_back(self, name, tmp_path):
        folder = SHAPES[name].write_config(tmp_path, 256)
        config = json.loads((folder / "config.json").read_text())
        assert Shape.from_config(config) == SHAPES[name]


class TestRoofline:
    def test_speedup_of_the_7b_shape(self):
        """E = 8, K = 12, acceptance length 9.27: 2.22, worked out by hand from the weights."""
        roofline = Roofline(SHAPES["llama-2-7b"], BYTES_ONLY)
        assert roofline.speedup(Decoding("layerskip", 8, 12, 9.27), 1, 0) == pytest.approx(
            2.22, abs=0.005
        )

    def test_plain_7b_on_an_h200(self):
        """13.2 GB of weights without the embedding, at 4.8 TB/s: 363 tokens/s."""
        roofline = Roofline(SHAPES["llama-2-7b"], H200)
        assert roofline.tokens_per_s(Decoding("plain"), 1, 0) == pytest.approx(363, abs=1)

    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_drafting_for_nothing_costs_more_than_plain_decoding(self, shape):
        roofline = Roofline(shape, H200)
        assert roofline.speedup(Decoding("layerskip", 1, 1, 1.0), 1, 0) < 1.0
        assert roofline.speedup(Decoding("layerskip", 1, 1, 2.0), 1, 0) > 1.0

    def test_reuse_saves_early_flops_and_no_bytes(self):
        """At batch 1 nothing; where compute decides, K of K + 1 tokens of the early stage."""
        shape = SHAPES["llama-2-7b"]
        roofline, decoding = Roofline(shape, H200), Decoding("layerskip", 8, 12, 9.27)
        without = replace(decoding, mode="layerskip-no-reuse")
        assert roofline.step_s(decoding, 1, 128) == roofline.step_s(without, 1, 128)
        saved_s = roofline.step_s(without, 128, 0) - roofline.step_s(decoding, 128, 0)
        layers = 8 * shape.layer_weights
        all_tokens_s = 2 * 128 * 13 * layers / H200.flops
        assert saved_s == pytest.approx(all_tokens_s - 2 * layers / H200.bandwidth)

    def test_kv_cache_counts_once_a_request(self):
        """2,000 tokens of 32 heads of 128 in 32 layers, K and V, two bytes each, per request."""
        roofline, plain = Roofline(SHAPES["llama-2-7b"], H200), Decoding("plain")
        extra_s = roofline.step_s(plain, 4, 2000) - roofline.step_s(plain, 4, 0)
        assert extra_s == pytest.approx(4 * 2000 * 2 * 32 * 128 * 32 * 2 / 4.8e12)

    def test_a_draft_vocabulary_shrinks_the_draft_alone(self):
        shape = SHAPES["llama-3-8b"]
        roofline, decoding = Roofline(shape, BYTES_ONLY), Decoding("layerskip", 4, 4, 3.0)
        sliced = replace(decoding, draft_vocab=32000)
        saved = roofline.step_s(decoding, 1, 0) - roofline.step_s(sliced, 1, 0)
        assert saved == pytest.approx(2 * 4 * (128256 - 32000) * 4096)
        assert replace(sliced, mode="draft-model") != sliced

    @pytest.mark.parametrize("mode", ["layerskip", "draft-model", "ngram"])
    def test_no_drafts_cost_what_plain_costs(self, mode):
        roofline = Roofline(SHAPES["llama-3-8b"], H200)
        decoding = Decoding(mode, 4, 0)
        assert roofline.speedup(decoding, 64, 1000) == pytest.approx(1.0)

    def test_early_exit_is_the_cut_models_plain_decoding(self):
        shape = SHAPES["llama-3-8b"]
        cut = Roofline(shape.first_layers(4), H200).step_s(Decoding("plain"), 8, 500)
        assert Roofline(shape, H200).step_s(Decoding("early-exit", 4), 8, 500) == cut

    @given(
        ends=st.lists(st.integers(1, 60), min_size=1, max_size=4, unique=True),
        drafts=st.lists(st.integers(0, 12), min_size=4, max_size=4),
    )
    def test_schedule_is_read_as_vllm_reads_it(self, ends, drafts):
        from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

        starts = [1, *(end + 1 for end in sorted(ends))]
        schedule = [
            [start, end, k] for start, end, k in zip(starts, sorted(ends), drafts, strict=False)
        ]
        lookup = build_dynamic_sd_schedule_lookup(schedule, 64, 8)
        assert [scheduled_drafts(schedule, 8, size) for size in range(1, 65)] == lookup[1:]


def test_limits_before_anything_is_run():
    """The draft vocabulary lifts the 8B shape's limit at batch 1 from 1.72 to 1.95."""
    tables = [
        limits.limits(_parse("--preset", name), "NVIDIA H200") for name in ("8b", "8b-vocab32k")
    ]
    assert [table.splitlines()[2].split(" | ")[3] for table in tables] == ["1.72", "1.95"]
    schedule = _parse("--preset", "7b-cnndm", "--schedule", "[[1, 8, 12], [9, 32, 0]]")
    last = limits.limits(schedule, "NVIDIA H200").splitlines()[-1]
    assert last.split(" | ")[1:6:2] == ["32", "1.00", "1.00"]


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H200", "NVIDIA H200"),
        ("NVIDIA H200 NVL", "NVIDIA H200"),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-80GB"),
        ("NVIDIA L40S", "NVIDIA L40S"),
        ("NVIDIA L40", None),
        (None, None),
    ],
)
def test_gpu_by_name(name, known):
    assert hardware.find_gpu(name) == (hardware.GPUS[known] if known else None)
    assert hardware.find_gpu(name, bandwidth_tb=4.0).bandwidth == 4e12


class TestPresets:
    @pytest.mark.parametrize(
        ("name", "length"), [("7b-cnndm", 9.27), ("7b-humaneval", 5.03), ("13b-cnndm", 9.94)]
    )
    def test_published_rates_become_lengths(self, name, length):
        assert presets.PRESETS[name].acceptance_length == length

    @given(st.integers(1, 16), st.floats(0, 1))
    def test_probability_and_length_are_inverse(self, num_drafts, probability):
        length = presets.expected_length(probability, num_drafts)
        again = presets.acceptance_probability(length, num_drafts)
        assert presets.expected_length(again, num_drafts) == pytest.approx(length)

    def test_fewer_drafts_accept_less_but_a_larger_share(self):
        length = presets.length_for(9.27, 12, 4)
        assert 1 + 4 * (9.27 - 1) / 12 < length < 5

    def test_geometric_rates_are_vllms_to_take(self):
        from vllm.config.speculative import SpeculativeConfig

        rates = presets.geometric_rates(9.27, 12)
        assert SpeculativeConfig._resolve_synthetic_acceptance_rates(12, rates, None) == rates
        assert 1 + sum(rates) == pytest.approx(9.27, abs=1e-4)

    def test_an_impossible_length_is_refused(self):
        with pytest.raises(ValueError, match=r"synthetic_acceptance_length=9 must be from 1 to 5"):
            presets.acceptance_probability(9, 4)


class TestModes:
    @pytest.mark.parametrize("mode", VLLM_MODES)
    def test_vllm_takes_the_config(self, mode, engine_config, checkpoint):
        speculation = Speculation(2, 4, acceptance_length=3.0, schedule=[[1, 4, 4], [5, 8, 0]])
        request = speculative_config(mode, speculation, Path(checkpoint))
        config = engine_config(request).speculative_config
        if mode in ("plain", "early-exit"):
            assert config is None
            return
        assert config.num_speculative_tokens == 4
        if mode == "ngram":
            assert config.rejection_sample_method == "standard"
        else:
            assert 1 + sum(config.synthetic_acceptance_rates) == pytest.approx(3.0, abs=1e-4)
        assert getattr(config, "reuse_exit_states", None) == {
            "layerskip": True, "layerskip-no-reuse": False
        }.get(mode)  # fmt: skip

    def test_length_without_a_schedule_has_the_least_spread(self):
        config = speculative_config("layerskip", Speculation(2, 4, acceptance_length=3.0), None)
        assert config["synthetic_acceptance_length"] == 3.0
        assert "synthetic_acceptance_rates" not in config

    def test_draft_vocab_is_a_size_or_a_file(self, tmp_path):
        settings = replace(_settings(), draft_vocab="100")
        config = engine_arguments(settings, "layerskip", tmp_path)["speculative_config"]
        assert json.loads(Path(config["draft_vocab"]).read_text()) == list(range(100))
        lines = tmp_path / "ids.txt"
        lines.write_text("5\n7\n")
        assert settings.num_draft_vocab_ids == 100
        assert replace(settings, draft_vocab=str(lines)).num_draft_vocab_ids == 2
        with pytest.raises(ValueError, match="--draft-vocab=9999 must be from 1 to 2048"):
            engine_arguments(replace(settings, draft_vocab="9999"), "layerskip", tmp_path)

    def test_cut_modes_serve_the_first_layers(self, tmp_path):
        settings = _settings()
        arguments = engine_arguments(settings, "draft-model", tmp_path / "a")
        draft = json.loads(
            Path(arguments["speculative_config"]["model"], "config.json").read_text()
        )
        target = json.loads(Path(arguments["model"], "config.json").read_text())
        assert (draft["num_hidden_layers"], target["num_hidden_layers"]) == (2, 8)
        arguments = engine_arguments(settings, "early-exit", tmp_path / "b")
        alone = json.loads(Path(arguments["model"], "config.json").read_text())
        assert alone["num_hidden_layers"] == 2

    def test_flags_of_vllm_serve(self):
        arguments = {"model": "m", "seed": 0, "enforce_eager": True, "x_y": False, "none": None}
        flags = command_line_flags({**arguments, "speculative_config": {"a": 1}})
        assert flags == [
            "--seed", "0", "--enforce-eager", "--no-x-y", "--speculative-config", '{"a": 1}'
        ]  # fmt: skip


@pytest.mark.parametrize("shard_size", ["50GB", "1MB"])
def test_a_cut_checkpoint_predicts_what_the_exit_predicts(shard_size, tmp_path):
    import torch
    from transformers import LlamaForCausalLM

    from vllm_layerskip.evaluation.exits import exit_logits, record_exit_states

    model = LlamaForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path / "whole", max_shard_size=shard_size)
    cut = write_cut_checkpoint(tmp_path / "whole", 3, tmp_path / "cut")
    first = LlamaForCausalLM.from_pretrained(cut, dtype=torch.float32).eval()
    input_ids = torch.arange(3, 40)[None]
    with torch.inference_mode(), record_exit_states(model) as states:
        model(input_ids)
        expected = exit_logits(model, states[2])
        torch.testing.assert_close(first(input_ids).logits, expected)
    assert first.config.num_hidden_layers == 3


def test_a_cut_checkpoint_keeps_its_tokenizer(tmp_path):
    cut = write_cut_checkpoint(EMBEDDED, 3, tmp_path)
    assert (cut / "tokenizer.json").read_bytes() == (EMBEDDED / "tokenizer.json").read_bytes()
    assert "layerskip" not in json.loads((cut / "config.json").read_text())


def _parse(*argv: str) -> Settings:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    parser.add_argument("--num-speculative-tokens", type=int)
    return settings_from(parser.parse_args(argv))


def _settings() -> Settings:
    return _parse("--tiny", "--device", "cpu")


class TestSettings:
    @pytest.mark.parametrize(
        "argv",
        [
            ["--tiny"],
            ["--preset", "8b-vocab32k", "--schedule", "[[1, 8, 4], [9, 16, 0]]"],
            ["--preset", "7b-cnndm", "--engine-args", '{"enable_chunked_prefill": false}'],
            ["--model", str(EMBEDDED), "--batch-sizes", "1", "8", "--enforce-eager"],
        ],
    )
    def test_options_make_the_same_settings_again(self, argv):
        settings = _parse(*argv)
        assert _parse(*settings.to_argv()) == settings

    def test_a_preset_fills_what_is_not_given(self):
        settings = _parse("--preset", "7b-cnndm", "--exit-layer", "6")
        assert (settings.shape, settings.exit_layer) == ("llama-2-7b", 6)
        assert (settings.num_speculative_tokens, settings.synthetic_acceptance_length) == (12, 9.27)

    def test_another_k_changes_the_presets_acceptance(self):
        settings = _parse("--preset", "7b-cnndm", "--num-speculative-tokens", "4")
        assert settings.synthetic_acceptance_length == presets.length_for(9.27, 12, 4)

    def test_a_checkpoint_names_its_exit_layer(self):
        settings = _parse("--model", str(EMBEDDED))
        assert (settings.exit_layer, settings.num_speculative_tokens) == (3, 5)
        assert settings.prompts == "python"
        assert settings.model_shape().num_layers == 12

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            ([], "--exit-layer=0"),
            (["--shape", "tiny"], "--exit-layer=0 and --num-speculative-tokens=0"),
            (["--exit-layer", "2", "--num-speculative-tokens", "2"], "Nothing to measure"),
            (["--model", str(EMBEDDED), "--shape", "tiny"], "--model cannot go with --shape"),
            (["--model", "/nowhere"], "--model=/nowhere is no checkpoint folder"),
        ],
    )
    def test_errors_name_the_option(self, argv, message):
        with pytest.raises(ValueError, match=message):
            _parse(*argv)


class TestWindow:
    @staticmethod
    def steps(*tokens: dict[str, int], finished: int) -> list[Step]:
        return [Step(float(i), t, i >= finished) for i, t in enumerate(tokens)]

    def test_all_requests_decode_in_it(self):
        """b starts late, a ends first: from b's first token to the step before a's last."""
        steps = self.steps(
            {"a": 1}, {"a": 3, "b": 1}, {"a": 2, "b": 4}, {"b": 1}, {"a": 1, "b": 5}, finished=4
        )
        window = steady_window(steps, 2)
        assert (window.seconds, window.num_tokens, window.num_steps) == (2.0, 7, 2)
        assert window.tokens_per_s == 3.5

    def test_too_short_a_run_is_an_error(self):
        with pytest.raises(ValueError, match="raise --output-len"):
            steady_window(self.steps({"a": 1}, {"a": 1, "b": 1}, {"a": 1}, finished=2), 2)


class TestPrompts:
    def test_random_prompts_are_the_same_every_time(self):
        first, again = (
            prompts.make_prompts("random", 3, 20, 100, Path("unused")) for _ in range(2)
        )
        assert first == again
        assert [len(ids) for ids in first] == [20] * 3
        assert all(3 <= token < 100 for ids in first for token in ids)

    def test_held_out_python(self):
        made = prompts.make_prompts("python", 4, 50, 1024, EMBEDDED)
        assert [len(ids) for ids in made] == [50] * 4
        assert len({tuple(ids) for ids in made}) == 4
        assert {ids[0] for ids in made} == {0}

    def test_a_file_in_spec_benchs_form(self, tmp_path):
        file = tmp_path / "questions.jsonl"
        turns = ["def main(): " * 20, "second turn"]
        file.write_text("\n".join([json.dumps({"turns": turns}), json.dumps({"prompt": "x = 1"})]))
        (ids,) = prompts.make_prompts(str(file), 1, 16, 1024, EMBEDDED)
        assert len(ids) == 16
        with pytest.raises(ValueError, match="has 1 texts of 16 tokens; 2 are needed"):
            prompts.make_prompts(str(file), 2, 16, 1024, EMBEDDED)

    def test_questions_come_from_every_category_in_turn(self, tmp_path):
        file = tmp_path / "questions.jsonl"
        questions = [("b", "b0"), ("b", "b1"), ("a", "a0"), ("a", "a long one " * 40), ("c", "c0")]
        file.write_text(
            "\n".join(json.dumps({"category": c, "turns": [text]}) for c, text in questions)
        )
        assert serve_bench.select_questions(file, EMBEDDED, 16) == ["a0", "b0", "c0", "b1"]


def _record(mode: str, batch_size: int, speed: float, **changes) -> results.Record:
    """A record as measure.py writes it."""
    settings = _parse("--preset", "7b-cnndm")
    drafts = None if mode == "plain" else {"acceptance_length": 9.27, "num_drafts": 10}
    if mode == "layerskip":
        drafts |= {"num_verify_steps_reused": 9, "num_verify_steps_full": 1}
    num_tokens = 1000 * batch_size if mode == "plain" else 9270 * batch_size
    run = {"seconds": 1.0, "num_tokens": num_tokens, "num_steps": 1000, "tokens_per_s": speed}
    return {
        "kind": "decode",
        "mode": mode,
        "settings": settings.identity(),
        "model_shape": vars(settings.model_shape()),
        "num_draft_vocab_ids": None,
        "provenance": {
            "command": "python -m benchmarks.decode.compare --preset 7b-cnndm",
            "commit": {"id": "abc", "dirty": False},
            "versions": {"vllm": "0.32.0"},
            "gpu": {"name": "NVIDIA H200", "driver": "580", "memory": "143771 MiB"},
            "cpu": {"model": "cpu", "count": 2},
        },
        "prompt_len": 128,
        "batch_size": batch_size,
        "engine": {"start_s": 60.0, "fresh_cache": False, "memory": {"kv_cache_bytes": 10**9},
                   "kv_capacity_tokens": 1000},
        "status": "ok",
        "tokens_per_s": speed,
        "step_ms": 1.0,
        "runs": [run, run, run],
        "speculation": drafts,
        **changes,
    }  # fmt: skip


class TestTable:
    def test_speedup_and_what_was_reached_of_the_limit(self):
        plain, ours = summary.rows([_record("plain", 1, 300.0), _record("layerskip", 1, 600.0)])
        assert (plain.speedup, ours.speedup) == (1.0, 2.0)
        # A little below the 2.22 of an empty KV cache.
        assert 2.19 < ours.speedup_limit < 2.22
        assert ours.speedup_reached == pytest.approx(2.0 / ours.speedup_limit)
        assert plain.tokens_reached == pytest.approx(300 / 359, rel=0.01)
        assert ours.reused == "9 / 10"

    def test_plain_decoding_is_everyones_baseline(self):
        """It depends on no speculation setting, and on batch size and prompt length."""
        other = _record("layerskip", 1, 450.0)
        other["settings"] = other["settings"] | {
            "num_speculative_tokens": 6,
            "schedule": [[1, 1, 6]],
        }
        larger = _record("layerskip", 4, 450.0)
        by_record = summary.rows([_record("plain", 1, 300.0), other, larger])
        assert [row.speedup for row in by_record] == [1.0, 1.5, None]

    def test_what_was_not_measured_says_why(self):
        missing = {"status": "no-room", "reason": "90 KV slots of 50"}
        (row,) = summary.rows([_record("plain", 128, 1.0, **missing)])
        cells = summary.cells(row)
        assert "no-room: 90 KV slots of 50" in cells
        assert len(cells) == len(summary.HEADER)

    def test_report_names_sources(self, tmp_path):
        file = tmp_path / "7b.json"
        for record in (_record("plain", 1, 300.0), _record("layerskip", 1, 600.0)):
            results.add_record(file, record)
        results.add_record(file, _serve_record())
        text = report.report(file)
        for part in ("7b.json", "NVIDIA H200", "commit abc", "vllm 0.32.0", "--preset 7b-cnndm"):
            assert part in text
        tables = [line.count("|") for line in text.splitlines() if line.startswith("|")]
        # Header, rule and rows; engines' and serving's tables have as many columns.
        decoding, others = len(summary.HEADER), len(report.SERVE_HEADER)
        assert (tables.count(decoding + 1), tables.count(others + 1)) == (4, 4 + 3)

    def test_plots_are_written_and_repeatable(self, tmp_path):
        file = tmp_path / "7b.json"
        for size in (1, 4):
            for record in (_record("plain", size, 300.0), _record("layerskip", size, 600.0)):
                results.add_record(file, record)
        first = plots.plot_file(file, tmp_path / "a")
        second = plots.plot_file(file, tmp_path / "b")
        assert sorted(path.name for path in first) == [
            f"7b-llama-2-7b-{kind}{suffix}"
            for kind in ("speedup", "tokens")
            for suffix in (".png", ".svg")
        ]
        assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def _serve_record(concurrency: int = 4) -> results.Record:
    record = _record("plain", 1, 1.0)
    names = ("output_throughput", "median_tpot_ms", "p99_tpot_ms", "median_ttft_ms", "p99_ttft_ms")
    for name in ("prompt_len", "batch_size", "engine", "runs"):
        del record[name]
    result = dict.fromkeys(names, 1.5) | {"completed": 26}
    return record | {"kind": "serve", "concurrency": concurrency, "result": result}


class TestResultFiles:
    def test_every_record_is_in_the_file_at_once(self, tmp_path):
        file = tmp_path / "folder" / "results.json"
        for number, batch_size in enumerate((1, 4, 8)):
            results.add_record(file, _record("plain", batch_size, 1.0))
            assert len(results.load_records(file)) == number + 1
        assert [path.name for path in file.parent.iterdir()] == ["results.json"]

    def test_resume_skips_what_is_finished(self, tmp_path):
        file = tmp_path / "results.json"
        for size, status in ((1, "ok"), (4, "no-room"), (8, "no-time"), (16, "error")):
            results.add_record(file, _record("plain", size, 1.0, status=status))
        settings = _parse("--preset", "7b-cnndm").identity()
        records = results.load_records(file)
        assert results.finished_cells(records, "plain", settings) == {(128, 1), (128, 4)}
        assert results.finished_cells(records, "layerskip", settings) == set()
        assert results.finished_cells(records, "plain", settings | {"dtype": "x"}) == set()

    def test_a_later_success_replaces_a_failure(self, tmp_path):
        file = tmp_path / "results.json"
        failed_start = _record("plain", 1, 1.0, status="error")
        del failed_start["prompt_len"], failed_start["batch_size"]
        results.add_record(file, failed_start)
        results.add_record(file, _record("layerskip", 1, 1.0, status="no-time"))
        results.add_record(file, _record("plain", 1, 2.0))
        statuses = [(r["mode"], r["status"]) for r in results.load_records(file)]
        assert statuses == [("layerskip", "no-time"), ("plain", "ok")]

    def test_another_file_is_refused(self, tmp_path):
        file = tmp_path / "package.json"
        file.write_text('{"name": "x"}')
        with pytest.raises(ValueError, match=r"package.json is no result file of schema 1"):
            results.load_records(file)


class TestCompare:
    """Its processes, with a stand-in for measure.py."""

    @pytest.fixture
    def run(self, tmp_path, monkeypatch):
        def run(body: str, time_limit: float | None = None) -> list[results.Record]:
            script = tmp_path / "measure.py"
            script.write_text("import sys, time\n" + body)
            monkeypatch.setattr(compare, "MEASURE", (str(script),))
            monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
            monkeypatch.setattr(compare, "STOP_MARGIN_S", 0.5)
            output = tmp_path / "results.json"
            deadline = None if time_limit is None else time.monotonic() + time_limit
            item = compare.Run("plain", _settings())
            compare.run_mode(item, output, tmp_path / "plain.log", deadline, fresh_cache=False)
            return results.load_records(output)

        return run

    ADD = """
from pathlib import Path
from benchmarks.engines.results import add_record
settings = {"shape": None, "model": "x", "device": "cpu"}
record = {"kind": "decode", "mode": "plain", "settings": settings, "status": "ok",
          "prompt_len": 1, "batch_size": 1, "tokens_per_s": 1.0, "step_ms": 1.0}
add_record(Path(sys.argv[sys.argv.index("--output") + 1]), record)
"""

    def test_a_failed_mode_leaves_its_error_and_what_it_measured(self, run):
        records = run(self.ADD + "sys.exit('no GPU')")
        assert [record["status"] for record in records] == ["ok", "error"]
        assert "no GPU" in records[1]["error"]

    def test_a_mode_is_killed_at_the_time_limit(self, run):
        start = time.monotonic()
        records = run(self.ADD + "time.sleep(60)", time_limit=3)
        assert time.monotonic() - start < 30
        assert [record["status"] for record in records] == ["ok", "no-time"]

    def test_no_mode_is_begun_without_time(self, run):
        (record,) = run(self.ADD, time_limit=0.5)
        assert (record["status"], record["reason"]) == ("no-time", "the table's time limit")

    def test_modes_with_drafts_run_once_for_each_k(self):
        runs = compare.plan(["plain", "layerskip"], _parse("--preset", "7b-cnndm"), [12, 6])
        assert [run.name for run in runs] == ["plain-k12", "layerskip-k12", "layerskip-k6"]
        assert runs[2].settings.synthetic_acceptance_length < 9.27


def test_graphs_are_those_of_the_tables_batches(tmp_path):
    """vLLM's default sizes end at 512 tokens: batch 64 and 128 would verify without a graph."""
    load = ("--preset", "7b-cnndm", "--batch-sizes", "1", "64", "128")
    graphs = {1, 64, 128, 13, 64 * 13, 128 * 13}
    for mode in ("plain", "layerskip"):
        arguments = engine_arguments(_parse(*load), mode, tmp_path / mode, fixed_batches=True)
        assert set(arguments["compilation_config"]["cudagraph_capture_sizes"]) == graphs
    schedule = ("--schedule", "[[1, 63, 12], [64, 128, 0]]", "--engine-args")
    settings = _parse(*load, *schedule, '{"compilation_config": {"mode": 0}, "seed": 1}')
    arguments = engine_arguments(settings, "layerskip", tmp_path / "schedule", fixed_batches=True)
    assert set(arguments["compilation_config"]["cudagraph_capture_sizes"]) == graphs
    assert (arguments["compilation_config"]["mode"], arguments["seed"]) == (0, 1)
    for without in (("--device", "cpu"), ("--enforce-eager",)):
        settings = _parse(*load, *without)
        arguments = engine_arguments(settings, "plain", tmp_path / without[0], fixed_batches=True)
        assert "compilation_config" not in arguments
    # Under load steps have any size: vLLM's own graphs.
    arguments = engine_arguments(_parse(*load), "layerskip", tmp_path / "serve")
    assert "compilation_config" not in arguments


class TestTrainingText:
    def test_copies_of_held_out_passages_stay_out(self, tmp_path):
        from vllm_layerskip.files.corpus import Corpus, with_packages

        lines = [f"value_{i} = {i}" for i in range(12)]
        corpus = Corpus({"a.py": "x = 1\n"}, {"held.py": "\n".join(lines)})
        texts = {"copy": ["import os", *(f"    {line}\n" for line in lines)], "own": ["y = 2"] * 9}
        for name, text in texts.items():
            (tmp_path / name).mkdir()
            (tmp_path / name / "module.py").write_text("\n".join(text))
        more = with_packages(corpus, [tmp_path], 10_000)
        assert sorted(more.train) == ["a.py", "packages/own/module.py"]
        assert with_packages(corpus, [tmp_path], 1).train == corpus.train
