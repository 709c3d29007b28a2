# SPDX-License-Identifier: Apache-2.0
"""The summary of a GPU session, and the check that CUDA graphs write plain decoding's tokens."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.gpu import check_graphs, graph_engines, verdict
from benchmarks.gpu.summary import HEADER, summary
from benchmarks.gpu.verdict import Answers, Difference, Observed
from vllm_layerskip.metrics.counters import SpecDecodeCounters

from .records import parse_settings


class TestSummary:
    @pytest.fixture
    def results(self, tmp_path):
        settings = parse_settings("--preset", "7b-cnndm").identity()
        facts = {"gpu": {"name": "NVIDIA H200", "driver": "580", "memory": "141 GB"}}

        def record(mode, speed, **values):
            num_tokens = int(speed)
            run = {
                "seconds": 1.0,
                "num_tokens": num_tokens,
                "num_steps": 100,
                "tokens_per_s": speed,
            }
            return {
                "kind": "decode", "mode": mode, "status": "ok", "settings": settings,
                "model_shape": vars(parse_settings("--preset", "7b-cnndm").model_shape()),
                "num_draft_vocab_ids": None, "prompt_len": 128, "batch_size": 1,
                "tokens_per_s": speed, "step_ms": 10.0, "runs": [run], "speculation": None,
                "provenance": facts, **values,
            }  # fmt: skip

        failed = {"status": "error", "reason": "exit status 1"}
        records = [record("plain", 300.0), record("layerskip", 600.0),
                   record("draft-model", 1.0, **failed)]  # fmt: skip
        (tmp_path / "first-7b.json").write_text(json.dumps({"schema": 1, "records": records}))
        return tmp_path

    def write_gpu(self, results, datasheet):
        facts = {"gpu": {"name": "NVIDIA H200"}, "cpu": {"model": "x"}}
        content = {
            "copy_bandwidth_tb_s": 2.4, "datasheet_bandwidth_tb_s": datasheet, "provenance": facts,
        }  # fmt: skip
        (results / "gpu.json").write_text(json.dumps(content))

    def row(self, results, mode):
        lines = summary(results).splitlines()
        (line,) = [line for line in lines if f"| {mode} |" in line]
        return [cell.strip() for cell in line.strip("|").split("|")]

    def test_limits_are_the_gpus_own(self, results):
        self.write_gpu(results, 4.8)
        assert "limits count with 4.8 TB/s, its datasheet's" in summary(results)
        plain, skip = self.row(results, "plain"), self.row(results, "layerskip")
        column = HEADER.index
        assert skip[column("x plain")] == "2.00"
        limit = float(plain[column("tok/s limit")])
        assert limit == pytest.approx(355, abs=10), "13.2 GB of weights and K/V at 4.8 TB/s"
        assert plain[column("of roofline")] == f"{300 / limit:.0%}"

    def test_an_unknown_gpus_limits_are_what_was_measured(self, results):
        self.write_gpu(results, 4.8)
        limit = HEADER.index("tok/s limit")
        known = float(self.row(results, "plain")[limit])
        self.write_gpu(results, None)
        assert "limits count with 2.4 TB/s, as measured" in summary(results)
        assert float(self.row(results, "plain")[limit]) == pytest.approx(known / 2, rel=0.01)

    def test_a_mode_that_failed_says_so(self, results):
        assert "error: exit status 1" in self.row(results, "draft-model")

    @pytest.mark.parametrize("content", ["", "{", '{"schema": 1}', "[]"])
    def test_a_damaged_file_costs_its_own_lines_alone(self, results, content):
        for name in ("exact.json", "gpu.json", "a.json", "z.json"):
            (results / name).write_text(content)
        page = summary(results)
        assert self.row(results, "plain")
        assert "first-7b.json" in page
        assert "exact.json cannot be read" in page

    def test_what_became_of_the_parts_is_there(self, results):
        outcomes = [{"name": "exact", "status": "failed: exit status 1", "seconds": 1.0}]
        (results / "session.json").write_text(json.dumps({"outcomes": outcomes}))
        assert "Parts: exact failed: exit status 1." in summary(results)

    def test_nothing_measured_is_no_error(self, tmp_path):
        assert summary(tmp_path) == "\n"


class TestCheckGraphs:
    PLAIN = Answers([[1, 2, 3], [4, 5, 6]], [[{1: 0.0}, {2: -0.5, 9: -0.5004}, {3: 0.0}]] * 2, 1.0)
    ALL = ("reuse", "draft", "verify")

    def seen(self, *found, **changes):
        values = {
            "differences": list(found), "num_compared": 100, "num_tokens": 128, "num_accepted": 50,
            "num_reused": 19, "num_full": 1, "num_replays": {"draft": 20, "verify": 19},
        }  # fmt: skip
        return Observed(**values | changes)

    def test_equal_answers_have_no_difference(self):
        assert verdict.differences(self.PLAIN, self.PLAIN) == []
        assert verdict.faults(self.seen(), "float32", self.ALL) == []

    def test_two_tokens_of_nearly_the_same_probability_are_rounding(self):
        other = Answers([[1, 9, 7], [4, 5, 6]], [], 1.0)
        (found,) = verdict.differences(self.PLAIN, other)
        assert (found.prompt, found.position, found.plain_token, found.token) == (0, 1, 2, 9)
        assert found.gap == pytest.approx(4e-4)
        assert verdict.faults(self.seen(found), "float32", self.ALL) == []

    @pytest.mark.parametrize("gap", [0.2, None])
    def test_another_difference_is_a_fault(self, gap):
        seen = self.seen(Difference(0, 1, 2, 9, gap))
        (fault,) = verdict.faults(seen, "float32", self.ALL)
        assert "answer 0 differs at token 1: 9 for 2" in fault

    def test_bfloat16_rounds_more(self):
        rounding, fault = (self.seen(Difference(0, 1, 2, 9, gap)) for gap in (0.2, 0.5))
        assert verdict.faults(rounding, "bfloat16", self.ALL) == []
        assert verdict.faults(fault, "bfloat16", self.ALL)

    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"num_accepted": 0}, "no draft was accepted"),
            ({"num_compared": 31}, "only 31 of 128 tokens were compared"),
            ({"num_reused": 10, "num_full": 10}, "10 verify steps reused exit states in 20 steps"),
            ({"num_replays": {"verify": 10}}, "10 verify graphs were replayed in 20 steps"),
            ({"num_replays": {"draft": 9}}, "9 draft graphs were replayed in 20 steps"),
        ],
    )  # fmt: skip
    def test_a_check_of_next_to_nothing_fails(self, changes, problem):
        """Equal tokens prove nothing where little was drafted, reused, replayed or compared."""
        seen = self.seen(**changes)
        seen = replace(seen, num_replays={"draft": 20, "verify": 19} | seen.num_replays)
        assert verdict.faults(seen, "float32", self.ALL) == [problem]

    def test_a_variant_must_be_without_its_part(self):
        problems = verdict.faults(self.seen(), "float32", ("reuse", "verify"), ("draft",))
        assert problems == ["20 draft graphs were replayed in 20 steps"]

    @pytest.fixture
    def narrowed(self, tmp_path, monkeypatch):
        """Runs the check with engines whose problems are given; the variants that ran."""

        def run(dtype, problems_of, *options):
            seen = asdict(self.seen()) | {
                "num_equal": 8, "num_answers": 8, "acceptance_length": 2.5, "waits": ["a.py:1"],
            }  # fmt: skip

            class StandIn:
                on_gpu, arguments, request = True, {"model": "x", "seed": 0}, {}

                def __init__(self, args):
                    self.twin = args.draft_quantization

                def run_plain(self):
                    return TestCheckGraphs.PLAIN

                def run(self, variant, plain):
                    if problems_of.get(variant) == "raise":
                        raise RuntimeError("capture failed")
                    return seen | {"variant": variant, "draft_quantization": self.twin,
                                   "problems": problems_of.get(variant, [])}  # fmt: skip

            def in_a_process(command, check):
                # The last ones count; of the process only its file is known.
                variant, output = command[-3], Path(command[-1])
                if problems_of.get(variant) != "killed":
                    one = seen | {"variant": variant, "problems": problems_of.get(variant, [])}
                    output.write_text(json.dumps({"checks": [one]}))

            output = tmp_path / "exact.json"
            output.write_text("an older run's")
            monkeypatch.setattr(check_graphs, "Check", StandIn)
            monkeypatch.setattr(check_graphs, "prepare_environment", lambda: None)
            monkeypatch.setattr(check_graphs.subprocess, "run", in_a_process)
            monkeypatch.setattr(
                sys, "argv", ["x", "--dtype", dtype, *options, "--output", str(output)]
            )
            if problems_of:
                with pytest.raises(SystemExit, match="1"):
                    check_graphs.main()
            else:
                check_graphs.main()
            checks = json.loads(output.read_text())["checks"]
            assert [path.name for path in tmp_path.iterdir()] == ["exact.json"]
            return [check["variant"] for check in checks], summary(tmp_path)

        # Provenance asks git, which needs processes.
        monkeypatch.setattr(check_graphs, "provenance", dict)
        return run

    def test_what_runs_where_nothing_fails(self, narrowed):
        assert narrowed("float32", {})[0] == ["layerskip"]
        variants, page = narrowed("bfloat16", {})
        assert variants == ["layerskip", "without reuse"]
        assert "waits for the GPU that plain decoding does not have: ['a.py:1']" in page
        assert "FAULT" not in page

    def test_a_failure_is_narrowed_down(self, narrowed):
        bad = ["no draft was accepted"]
        variants, page = narrowed("float32", {"layerskip": bad, "without reuse": bad})
        assert variants == list(check_graphs.VARIANTS)
        assert page.count("FAULT: no draft was accepted") == 2

    def test_an_engine_that_does_not_start_is_narrowed_down_too(self, narrowed, capsys):
        ends = {"layerskip": "raise", "drafts without graphs": "killed"}
        variants, page = narrowed("float32", ends)
        assert variants == list(check_graphs.VARIANTS)
        assert "layerskip: no answer; FAULT: RuntimeError: capture failed" in page
        assert "drafts without graphs: no answer; FAULT: its process ended" in page
        assert "Traceback" in capsys.readouterr().err

    def test_a_twin_needs_no_control_and_names_its_kind(self, narrowed):
        variants, page = narrowed("bfloat16", {}, "--draft-quantization", "int4")
        assert variants == ["layerskip"]
        assert "layerskip int4: 8 of 8 answers" in page

    @pytest.mark.parametrize(
        ("twin", "variant", "expected", "ruled_out"),
        [
            ("none", "layerskip", {"reuse", "draft", "verify"}, set()),
            ("int4", "layerskip", {"draft", "verify"}, {"reuse"}),
            ("int4", "drafts without graphs", {"verify"}, {"reuse", "draft"}),
            ("none", "without reuse", {"draft", "verify"}, {"reuse"}),
        ],
    )
    def test_what_an_engine_must_do(self, twin, variant, expected, ruled_out):
        check = graph_engines.Check.__new__(graph_engines.Check)
        check.on_gpu, check.twin = True, twin
        assert check._expected(variant) == (expected, ruled_out)

    def test_times_are_those_of_second_answers(self, monkeypatch):
        """The first ones compile kernels: 5.1 s for 0.2 s, on the first GPU."""
        seconds = iter([5.0, 0.2])
        check = graph_engines.Check.__new__(graph_engines.Check)
        check.on_gpu, check.twin, check.request, check.prompts = True, "none", {}, ["x"]
        check.args = SimpleNamespace(dtype="float32", max_tokens=4)
        monkeypatch.setattr(check, "_start", lambda *args: None)
        monkeypatch.setattr(graph_engines, "count_replays", lambda llm: {})
        monkeypatch.setattr(
            graph_engines, "read_counters", lambda llm: SpecDecodeCounters(1, 1, 1, (1,), 1, 0)
        )
        monkeypatch.setattr(
            graph_engines, "answer",
            lambda *args, **kwargs: replace(self.PLAIN, seconds=next(seconds)),
        )  # fmt: skip
        found = check.run("layerskip", replace(self.PLAIN, seconds=0.1))
        assert found["answer_s"] == {"plain": 0.1, "layerskip": 0.2}

    def test_waits_are_named_by_their_place(self):
        class StandIn:
            def generate(self, prompts, params, use_tqdm):
                places = {"torch": 7, "other": 8}
                texts = {"torch": "called a synchronizing CUDA operation", "other": "deprecated"}
                for name, line in places.items():
                    warnings.warn_explicit(texts[name], UserWarning, f"/a/worker/{name}.py", line)
                return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[1], logprobs=None)])]

        assert graph_engines.answer(StandIn(), ["x"], 1, None).waits == ("worker/torch.py:7",)
