# SPDX-License-Identifier: Apache-2.0
"""Settings, presets, the engine of a mode, and result files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.engines import presets, results
from benchmarks.engines.arguments import command_line_flags, engine_arguments
from benchmarks.engines.cut_checkpoint import write_cut_checkpoint
from benchmarks.engines.facts import worker_memory
from benchmarks.engines.modes import VLLM_MODES, Speculation, speculative_config
from vllm_layerskip import embedded_checkpoint
from vllm_layerskip.errors import UserError

from .records import decode_record, parse_settings, tiny_settings

EMBEDDED = embedded_checkpoint()


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
        with pytest.raises(UserError, match=r"synthetic_acceptance_length=9 must be from 1 to 5"):
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

    @pytest.mark.parametrize(("layers", "kind"), [(2, "int4"), (4, "int8")])
    def test_vllm_takes_a_twin(self, layers, kind, engine_config):
        speculation = Speculation(layers, 4, acceptance_length=3.0, draft_quantization=kind)
        request = speculative_config("layerskip", speculation, None)
        config = engine_config(request).speculative_config
        assert (config.exit_layer, config.draft_quantization) == (layers, kind)
        assert config.reuse_exit_states is False
        without = speculative_config("layerskip-no-reuse", speculation, None)
        assert without["draft_quantization"] == "none"  # Whatever the checkpoint's block says.

    def test_length_without_a_schedule_has_the_least_spread(self):
        config = speculative_config("layerskip", Speculation(2, 4, acceptance_length=3.0), None)
        assert config["synthetic_acceptance_length"] == 3.0
        assert "synthetic_acceptance_rates" not in config

    def test_draft_vocab_is_a_size_or_a_file(self, tmp_path):
        settings = replace(tiny_settings(), draft_vocab="100")
        config = engine_arguments(settings, "layerskip", tmp_path)["speculative_config"]
        assert json.loads(Path(config["draft_vocab"]).read_text()) == list(range(100))
        lines = tmp_path / "ids.txt"
        lines.write_text("5\n7\n")
        assert settings.num_draft_vocab_ids == 100
        assert replace(settings, draft_vocab=str(lines)).num_draft_vocab_ids == 2
        with pytest.raises(UserError, match="--draft-vocab=9999 must be from 1 to 2048"):
            engine_arguments(replace(settings, draft_vocab="9999"), "layerskip", tmp_path)

    def test_cut_modes_serve_the_first_layers(self, tmp_path):
        settings = tiny_settings()
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
        settings = parse_settings(*argv)
        assert parse_settings(*settings.to_argv()) == settings

    def test_a_preset_fills_what_is_not_given(self):
        settings = parse_settings("--preset", "7b-cnndm", "--exit-layer", "6")
        assert (settings.shape, settings.exit_layer) == ("llama-2-7b", 6)
        assert (settings.num_speculative_tokens, settings.synthetic_acceptance_length) == (12, 9.27)

    def test_another_k_changes_the_presets_acceptance(self):
        settings = parse_settings("--preset", "7b-cnndm", "--num-speculative-tokens", "4")
        assert settings.synthetic_acceptance_length == presets.length_for(9.27, 12, 4)

    def test_all_layers_are_the_models(self):
        twin = ("--exit-layer", "all", "--draft-quantization", "int4")
        assert parse_settings("--preset", "7b-cnndm", *twin).exit_layer == 32
        assert parse_settings("--model", str(EMBEDDED), *twin).exit_layer == 12

    def test_a_checkpoint_names_its_exit_layer(self):
        settings = parse_settings("--model", str(EMBEDDED))
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
            (["--shape", "tiny", "--exit-layer", "all"], "--num-speculative-tokens=0"),
            (["--model", "/nowhere"], "--model=/nowhere is no checkpoint folder"),
        ],
    )
    def test_errors_name_the_option(self, argv, message):
        with pytest.raises(UserError, match=message):
            parse_settings(*argv)


def test_graphs_are_those_of_the_tables_batches(tmp_path):
    """vLLM's default sizes end at 512 tokens: batch 64 and 128 would verify without a graph."""
    load = ("--preset", "7b-cnndm", "--batch-sizes", "1", "64", "128")
    graphs = {1, 64, 128, 13, 64 * 13, 128 * 13}
    for mode in ("plain", "layerskip"):
        arguments = engine_arguments(
            parse_settings(*load), mode, tmp_path / mode, fixed_batches=True
        )
        assert set(arguments["compilation_config"]["cudagraph_capture_sizes"]) == graphs
    schedule = ("--schedule", "[[1, 63, 12], [64, 128, 0]]", "--engine-args")
    settings = parse_settings(*load, *schedule, '{"compilation_config": {"mode": 0}, "seed": 1}')
    arguments = engine_arguments(settings, "layerskip", tmp_path / "schedule", fixed_batches=True)
    assert set(arguments["compilation_config"]["cudagraph_capture_sizes"]) == graphs
    assert (arguments["compilation_config"]["mode"], arguments["seed"]) == (0, 1)
    for without in (("--device", "cpu"), ("--enforce-eager",)):
        settings = parse_settings(*load, *without)
        arguments = engine_arguments(settings, "plain", tmp_path / without[0], fixed_batches=True)
        assert "compilation_config" not in arguments
    # Under load steps have any size: vLLM's own graphs.
    arguments = engine_arguments(parse_settings(*load), "layerskip", tmp_path / "serve")
    assert "compilation_config" not in arguments


class TestWorkerMemory:
    """The counts that a table shows, of a worker on a CPU."""

    def memory(self, draft_state, twin):
        speculator = SimpleNamespace(draft_state=draft_state, draft_twin=twin)
        runner = SimpleNamespace(kv_caches=[torch.zeros(2, 8)], speculator=speculator)
        return worker_memory(SimpleNamespace(model_runner=runner))

    def test_a_twin_counts_its_layers_and_its_head(self):
        twin = SimpleNamespace(num_bytes=1000, num_head_bytes=200)
        facts = self.memory(SimpleNamespace(exit_states=None), twin)
        assert facts["twin_bytes"] == 1200
        assert facts["exit_state_bytes"] == 0

    def test_without_a_twin_there_are_exit_states(self):
        facts = self.memory(SimpleNamespace(exit_states=SimpleNamespace(num_bytes=64)), None)
        assert facts == {"kv_cache_bytes": 64, "exit_state_bytes": 64}


class TestResultFiles:
    def test_every_record_is_in_the_file_at_once(self, tmp_path):
        file = tmp_path / "folder" / "results.json"
        for number, batch_size in enumerate((1, 4, 8)):
            results.add_record(file, decode_record("plain", batch_size, 1.0))
            assert len(results.load_records(file)) == number + 1
        assert [path.name for path in file.parent.iterdir()] == ["results.json"]

    def test_resume_skips_what_is_finished(self, tmp_path):
        file = tmp_path / "results.json"
        for size, status in ((1, "ok"), (4, "no-room"), (8, "no-time"), (16, "error")):
            results.add_record(file, decode_record("plain", size, 1.0, status=status))
        settings = parse_settings("--preset", "7b-cnndm").identity()
        records = results.load_records(file)
        assert results.finished_cells(records, "plain", settings) == {(128, 1), (128, 4)}
        assert results.finished_cells(records, "layerskip", settings) == set()
        assert results.finished_cells(records, "plain", settings | {"dtype": "x"}) == set()

    def test_a_later_success_replaces_a_failure(self, tmp_path):
        file = tmp_path / "results.json"
        failed_start = decode_record("plain", 1, 1.0, status="error")
        del failed_start["prompt_len"], failed_start["batch_size"]
        results.add_record(file, failed_start)
        results.add_record(file, decode_record("layerskip", 1, 1.0, status="no-time"))
        results.add_record(file, decode_record("plain", 1, 2.0))
        statuses = [(r["mode"], r["status"]) for r in results.load_records(file)]
        assert statuses == [("layerskip", "no-time"), ("plain", "ok")]

    def test_another_file_is_refused(self, tmp_path):
        file = tmp_path / "package.json"
        file.write_text('{"name": "x"}')
        with pytest.raises(UserError, match=r"package.json is no result file of schema 1"):
            results.load_records(file)
