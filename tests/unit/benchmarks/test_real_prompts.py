# SPDX-License-Identifier: Apache-2.0
"""Prompts, statistics, tables and processes of benchmarks.prompts.real_prompts.

tests/engine/commands/test_real_prompts.py runs it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.engines.questions import Question
from benchmarks.engines.settings import Settings
from benchmarks.prompts import real_prompts
from benchmarks.prompts import summary as prompt_summary
from benchmarks.prompts.chats import Chats
from benchmarks.prompts.jobs import jobs, modes_with_pairs
from benchmarks.prompts.measure import Turn, accepted_by_position
from benchmarks.prompts.records import load, save
from benchmarks.prompts.tables import category_table, left_out, position_table, table
from vllm_layerskip import embedded_checkpoint
from vllm_layerskip.errors import UserError

from .records import SPEC_BENCH, write_lines
from .records import prompts_answer as answer
from .records import prompts_record as record

ROOT = Path(__file__).parents[3]
EMBEDDED = embedded_checkpoint()


class TestChats:
    @pytest.fixture(scope="class")
    def tokenizer(self):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(EMBEDDED)

    def test_a_second_turn_has_the_first_and_its_answer_before_it(self, tokenizer):
        answer = tokenizer("    return 1\n", add_special_tokens=False)["input_ids"]
        ended = [*answer, tokenizer.eos_token_id]
        ids = Chats(tokenizer, chat=False).token_ids(("def f():\n", "def g():\n"), [ended])
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert text == "def f():\n    return 1\n\n\ndef g():\n"
        assert ids.count(tokenizer.eos_token_id) == 0

    def test_the_template_writes_the_special_tokens_once(self, tokenizer):
        ids = Chats(tokenizer, chat=True).token_ids(("a", "b"), [tokenizer("x")["input_ids"]])
        # The embedded template ends each message with a line's end.
        assert tokenizer.decode(ids, skip_special_tokens=True) == "a\nx\nb\n"
        assert ids.count(tokenizer.bos_token_id) == 1


class TestStatistics:
    PLAIN = record(
        "plain",
        answer("q#0", 10, 9, 0, total_ms=[100, 900, 110], tpot_ms=[10, 90, 11]),
        answer("q#1", 30, 29, 0, total_ms=[390, 390, 390], tpot_ms=[13, 13, 13]),
        answer("r#0", 20, 19, 0, total_ms=[200, 200, 200], tpot_ms=[10, 10, 10], category="d"),
    )
    OURS = record(
        "layerskip",
        answer("q#0", 10, 4, 5, total_ms=[55, 55, 550], tpot_ms=[5, 5, 50]),
        answer("q#1", 30, 10, 22, total_ms=[195, 195, 195], tpot_ms=[6, 6, 6]),
        answer("r#0", 20, 9, 10, total_ms=[400, 400, 400], tpot_ms=[20, 20, 20], category="d",
               output="another"),
    )  # fmt: skip

    def test_by_category_and_over_all(self):
        c, d, both = prompt_summary.summarize(self.OURS, self.PLAIN)
        assert (c.category, d.category, both.category) == ("c", "d", "all")
        assert (c.num_questions, c.num_answers, c.num_tokens) == (1, 2, 20)
        assert (both.num_questions, both.num_answers) == (2, 3)
        assert c.acceptance_length == pytest.approx(1 + 27 / 14)
        assert d.acceptance_length == pytest.approx(1 + 10 / 9)
        assert both.acceptance_length == pytest.approx(1 + 37 / 23)
        assert (c.num_equal, d.num_equal, both.num_equal) == (2, 0, 2)

    def test_speeds_are_spec_benchs_over_medians_of_the_runs(self):
        c, d, both = prompt_summary.summarize(self.OURS, self.PLAIN)
        # Both turns of a question together; plain's runs of q#0 have the median 110 ms.
        assert c.tokens_per_s == pytest.approx(1e3 * 40 / 250)
        assert c.speedup == pytest.approx(500 / 250)
        assert d.speedup == pytest.approx(0.5)
        # The ratio of means, not the mean of ratios.
        assert both.speedup == pytest.approx((160 + 50) / (80 + 100))
        assert c.decoding_speedup == pytest.approx((11 + 13) / (5 + 6))

    def test_plain_has_no_acceptance_and_is_its_own_measure(self):
        *_, both = prompt_summary.summarize(self.PLAIN, self.PLAIN)
        assert both.acceptance_length is None
        assert both.speedup == both.decoding_speedup == 1
        assert both.num_equal == both.num_answers == 3

    def test_a_step_without_a_draft_counts_as_one_token(self):
        one = answer("q#0", 9, 6, 2, total_ms=[1], tpot_ms=[1])
        plain = record("plain", answer("q#0", 9, 8, 0, total_ms=[1], tpot_ms=[1]))
        (only,) = prompt_summary.summarize(record("ngram", one), plain)
        assert only.acceptance_length == pytest.approx(1 + 2 / 6)

    def test_turns_that_only_one_mode_could_ask_are_left_out_and_are_a_difference(self):
        fewer = record("layerskip", *self.OURS["answers"][:1])
        (only,) = prompt_summary.summarize(fewer, self.PLAIN)
        assert only.num_answers == 1
        assert prompt_summary.outputs_differ(fewer, self.PLAIN)
        assert prompt_summary.summarize(self.PLAIN, fewer)[0].num_answers == 1
        assert not prompt_summary.outputs_differ(self.PLAIN, self.PLAIN)

    def test_sampled_outputs_are_not_compared(self):
        sampled = record("layerskip", *self.OURS["answers"], temperature=0.8)
        assert {r.num_equal for r in prompt_summary.summarize(sampled, self.PLAIN)} == {None}

    def test_an_answer_of_one_token_has_no_time_of_decoding(self):
        single = answer("q#0", 1, 0, 0, total_ms=[10], tpot_ms=[None])
        (only,) = prompt_summary.summarize(record("layerskip", single), record("plain", single))
        assert only.decoding_speedup is None
        assert only.speedup == 1

    def test_a_turns_times(self):
        turn = Turn(Question("q", "c", ("?",)), start=1.0, arrivals=[(3.0, 1), (4.0, 3), (5.0, 1)])
        assert (turn.num_steps, turn.seconds, turn.tpot_s) == (2, 4.0, 0.5)
        assert Turn(turn.question, arrivals=[(3.0, 1)]).tpot_s is None

    def test_the_table_has_each_mode_in_each_category(self):
        rows = table([self.PLAIN, self.OURS]).splitlines()[2:]
        assert [row.split(" | ")[0].strip("| ") for row in rows] == [
            "c",
            "c",
            "d",
            "d",
            "all",
            "all",
        ]
        # Decoding of 9 and 29 tokens: 45 and 174 ms, in one run 450 and 174.
        assert (
            "| layerskip, E = 3, K = 5 | 2.93 | 173.5 (60.9 to 173.5) | 2.17 (0.75 to 5.42) | 2.00 "
            "| 2 of 2 |" in rows[1]
        )
        assert "| plain |  | 79.8 (32.0 to 81.4) |  |  | 2 of 2 |" in rows[0]
        records = [self.PLAIN, self.OURS]
        assert "| c | 1 | 2 | 2.93 | 2.00 |" in category_table(records, speedups=True)
        assert "| c | 1 | 2 | 2.93 |\n" in category_table(records, speedups=False)

    def test_speeds_of_decoding_have_a_range_over_the_runs(self):
        c, *_ = prompt_summary.summarize(self.OURS, self.PLAIN)
        tokens, plain_ms = 9 + 29, (9 * 10 + 29 * 13, 9 * 90 + 29 * 13, 9 * 11 + 29 * 13)
        assert c.speeds.plain == pytest.approx([1e3 * tokens / ms for ms in plain_ms])
        ours_ms = (9 * 5 + 29 * 6, 9 * 5 + 29 * 6, 9 * 50 + 29 * 6)
        assert c.speeds.ours == pytest.approx([1e3 * tokens / ms for ms in ours_ms])
        assert c.speeds.speedup == pytest.approx(plain_ms[2] / ours_ms[0])
        low, high = c.speeds.speedup_range
        assert low == pytest.approx(plain_ms[0] / ours_ms[2])
        assert high == pytest.approx(plain_ms[1] / ours_ms[0])

    def test_requests_at_once_have_the_speed_of_the_whole_alone(self):
        ours, plain = (
            one | {"settings": one["settings"] | {"batch_size": 4}, "runs_tokens_per_s": speeds}
            for one, speeds in ((self.OURS, [30.0, 20.0]), (self.PLAIN, [10.0, 10.0]))
        )
        c, d, both = prompt_summary.summarize(ours, plain)
        assert c.speeds is d.speeds is None
        assert both.speeds.speedup == 2.5
        assert both.speeds.speedup_range == (2.0, 3.0)
        text = table([plain, ours])
        assert "| c | 1 | 2 | 20 | layerskip, E = 3, K = 5 | 2.93 |  |  | 2.00 | 2 of 2 |" in text
        assert "| 25.0 (20.0 to 30.0) | 2.50 (2.00 to 3.00) |" in text

    def test_a_table_of_sampled_answers_has_acceptance_and_speed_only(self):
        plain, ours = (one | {"sampling": {"temperature": 0.7}} for one in (self.PLAIN, self.OURS))
        assert "equal" not in table([plain, ours])
        assert "| 2.00 |" in table([plain, ours])

    def test_acceptance_by_position_adds_up_to_the_length(self):
        counts = accepted_by_position([[3, 1, 0, 2], [0, 4, 1, 0]])
        assert counts == [8, 3, 2]
        assert accepted_by_position([[], []]) == []
        ours = self.OURS | {"num_accepted_at": [20, 12, 5]}
        shares = prompt_summary.acceptance_by_position(ours)
        assert shares == pytest.approx([20 / 23, 12 / 23, 5 / 23])
        (*_, both) = prompt_summary.summarize(ours, self.PLAIN)
        assert 1 + sum(shares) == pytest.approx(both.acceptance_length)
        text = position_table([self.PLAIN, ours])
        assert text.splitlines()[2:] == ["| layerskip, E = 3, K = 5 | 0.87 | 0.52 | 0.22 |"]

    def test_spread(self):
        assert prompt_summary.runs_spread({"runs_tokens_per_s": [8.0, 10.0, 11.0]}) == 0.3

    def test_speed_ups_of_any_two_runs(self):
        ours, plain = ({"runs_tokens_per_s": speeds} for speeds in ([8.0, 12.0], [4.0, 5.0, 6.0]))
        assert prompt_summary.speedup_range(ours, plain) == (8 / 6, 3.0)


class TestRuns:
    def test_each_mode_runs_once_for_what_it_depends_on(self):
        pairs = [(3, 5), (9, 5), (3, 2)]
        found = modes_with_pairs(["plain", "layerskip", "ngram"], pairs)
        assert found == [
            ("plain", (3, 5)),
            *(("layerskip", pair) for pair in pairs),
            ("ngram", (3, 5)),
            ("ngram", (3, 2)),
        ]

    def test_every_mode_gets_the_same_questions_and_model_length(self, tmp_path):
        long = {"question_id": 2, "category": "long", "turns": ["x = 1\n" * 400, "again"]}
        path = write_lines(tmp_path / "q.jsonl", SPEC_BENCH, long)
        argv = ["--model", str(EMBEDDED), "--questions", str(path), "--pairs", "3:5", "9:2"]
        found, _ = jobs(real_prompts.build_parser().parse_args([*argv, "--max-tokens", "40"]))
        assert [job["mode"] for job in found] == ["plain", "layerskip", "layerskip"]
        for job in found:
            assert [question["id"] for question in job["questions"]] == ["81"]
            assert job["source"]["too_long"] == {"long": 1}
            settings = Settings(**job["settings"])
            assert settings.max_model_len == 512
            # Prompt, answer and a last step's drafts have room, also with the larger K.
            assert job["sampling"]["max_prompt_tokens"] == 512 - 40 - 5 - 1

    def test_resume_measures_what_is_missing_and_refuses_other_settings(
        self, tmp_path, monkeypatch, capsys
    ):
        path, output = write_lines(tmp_path / "q.jsonl", SPEC_BENCH), tmp_path / "out.json"
        measured = []

        def run_job(job, folder):
            settings = Settings(**job["settings"])
            measured.append((job["mode"], settings.exit_layer))
            return record(
                job["mode"], answer("81#0", 9, 4, 4, total_ms=[1], tpot_ms=[1])
            ) | {
                "settings": settings.identity() | {"batch_size": 1},
                "drafts": job["drafts"],
                "sampling": job["sampling"],
                "questions": job["source"],
                "later_turns_left_out": {},
                "runs_tokens_per_s": [1.0],
            }  # fmt: skip

        def main(*options):
            argv = ["real_prompts.py", "--model", str(EMBEDDED), "--questions", str(path)]
            monkeypatch.setattr(sys, "argv", [*argv, "--output", str(output), *options])
            return real_prompts.main()

        monkeypatch.setattr(real_prompts, "run_job", run_job)
        assert main("--pairs", "3:5") == 0
        assert main("--pairs", "3:5", "9:5", "--resume") == 0
        assert measured == [("plain", 3), ("layerskip", 3), ("layerskip", 9)]
        with pytest.raises(SystemExit, match="2"):
            main("--pairs", "3:5", "9:5", "--max-tokens", "8", "--resume")
        assert "has other runs (plain;" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            main("--pairs", "3:5")
        assert "exists. Add --resume" in capsys.readouterr().err
        assert len(measured) == len(load(output)) == 3

    def test_resume_goes_on_with_the_drafts_that_failed(self, tmp_path, monkeypatch, capsys):
        path, output = write_lines(tmp_path / "q.jsonl", SPEC_BENCH), tmp_path / "out.json"
        broken, measured = {"b"}, []

        def run_job(job, folder):
            name = job["drafts"]["name"] if job["drafts"] else job["mode"]
            if name in broken:
                raise RuntimeError(f"{name} failed:\nits log")
            measured.append(name)
            settings = Settings(**job["settings"])
            return record(
                job["mode"], answer("81#0", 9, 4, 4, total_ms=[1], tpot_ms=[1])
            ) | {
                "settings": settings.identity() | {"batch_size": 1},
                "drafts": job["drafts"],
                "sampling": job["sampling"],
                "questions": job["source"],
                "later_turns_left_out": {},
                "runs_tokens_per_s": [1.0],
            }  # fmt: skip

        def main(*options):
            drafts = (
                f'{name}={{"exit_layer": {e}, "num_speculative_tokens": 4}}'
                for name, e in (("a", 2), ("b", 3), ("c", 4))
            )
            argv = ["real_prompts.py", "--model", str(EMBEDDED), "--questions", str(path)]
            argv += ["--output", str(output), "--drafts", *drafts, *options]
            monkeypatch.setattr(sys, "argv", argv)
            return real_prompts.main()

        monkeypatch.setattr(real_prompts, "run_job", run_job)
        assert main() == 1
        assert measured == ["plain", "a", "c"]
        broken.clear()
        assert main("--resume") == 0
        assert measured == ["plain", "a", "c", "b"]
        assert [r["drafts"] and r["drafts"]["name"] for r in load(output)] == [None, "a", "c", "b"]
        assert "| layerskip, b |" in capsys.readouterr().out

    def test_the_modes_that_do_not_fail_are_kept(self, tmp_path, monkeypatch, capsys):
        path = write_lines(tmp_path / "q.jsonl", SPEC_BENCH)

        def run_job(job, folder):
            raise RuntimeError(f"{job['mode']} failed:\nits log")

        monkeypatch.setattr(real_prompts, "run_job", run_job)
        argv = ["real_prompts.py", "--model", str(EMBEDDED), "--questions", str(path)]
        monkeypatch.setattr(sys, "argv", argv)
        assert real_prompts.main() == 1
        assert capsys.readouterr().err.count("failed:\nits log") == 2

    @pytest.mark.parametrize(
        ("options", "error"),
        [
            (["--modes", "layerskip"], "must include plain"),
            (["--pairs", "8"], "must be E:K, such as 8:6"),
            (["--repeats", "0"], "--repeats: '0' must be an integer of at least 1"),
            (["--pairs", "12:2"], "--pairs 12:2: E must be from 1 to 11"),
            (["--pairs", "3:0"], "K at least 1"),
            (["--max-tokens", "512"], "--max-tokens 512 leaves no room for a prompt"),
            (["--max-tokens", "505"], "none has a first prompt of at most 1 tokens"),
            (["--questions", "none.jsonl"], "none.jsonl: .*no such file"),
            (["--model", "none"], "--model=none is no checkpoint folder"),
            (["--temperature", "-1"], "--temperature -1.0 must be at least 0"),
            (["--drafts", "x"], "'x' must be NAME=JSON"),
            (["--drafts", "x={}", "--pairs", "3:5"], "--pairs cannot go with --drafts"),
            (["--drafts", 'x={"exit_layer": 12}'], "--drafts x: speculative_config: exit_layer=12"),
        ],
    )  # fmt: skip
    def test_a_mistake_is_named_before_anything_starts(self, tmp_path, options, error):
        path = write_lines(tmp_path / "q.jsonl", SPEC_BENCH)
        argv = ["--model", str(EMBEDDED), "--questions", str(path), *options]
        process = subprocess.run(
            [sys.executable, "-m", "benchmarks.prompts.real_prompts", *argv],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert process.returncode == 2
        (message,) = [line for line in process.stderr.splitlines() if ": error: " in line]
        assert re.search(error, message)

    def test_what_is_left_out_is_counted(self):
        one = {
            "questions": {"too_long": {"rag": 80, "extraction": 6}},
            "later_turns_left_out": {"writing": 2},
            "sampling": {"max_prompt_tokens": 458},
        }
        text = left_out([one])
        assert "questions of the file by their first prompt, 86 (rag 80, extraction 6)" in text
        assert "later turns, whose prompt has the answer before, 2 (writing 2)" in text
        assert "458 tokens" in text
        empty = one | {"questions": {"too_long": {}}, "later_turns_left_out": {}}
        assert left_out([empty]) == "Nothing was left out."

    def test_a_file_has_what_is_counted_and_stays_small(self, tmp_path):
        """As large as all of Spec-Bench with a second turn for 80, plain and seven drafts."""
        answers = [
            answer(f"{number}#{turn}", 200 + number % 57, 60, 197, output=f"{number:06x}",
                   total_ms=[12300], tpot_ms=[45.6], category=f"category {number // 40}")
            for number in range(480) for turn in range(2 if number < 80 else 1)
        ]  # fmt: skip
        config = '{"exit_layer": "all", "num_speculative_tokens": 4, "draft_quantization": "int4"}'
        facts = {"provenance": {"command": f"python -m x --drafts {config * 7}", "more": "x" * 600}}
        records = [record("plain", *answers) | facts]
        records += [record("layerskip", *answers, k=k) | facts for k in range(7)]
        path = tmp_path / "folder" / "all.json"
        save(path, records)
        assert path.stat().st_size < 150_000
        assert len(path.read_text().splitlines()) == 3 + len(records) + 1
        assert load(path) == records

    def test_answers_that_a_mode_lacks_and_that_changed_come_back(self, tmp_path):
        times = {"total_ms": [9.5, None], "tpot_ms": [1, None]}
        all_three = [
            answer("json/encoder/a-1#0", 5, 4, 0, category="json/encoder", **times),
            answer("q#0", 5, 4, 0, **times) | {"same_in_every_run": False},
            answer("q#1", 1, 0, 0, **times),
        ]
        plain = record("plain", *all_three)
        ours = record("layerskip", all_three[2])
        save(tmp_path / "o.json", [ours, plain])
        loaded, loaded_plain = load(tmp_path / "o.json")
        assert loaded == ours
        # The order of the first record that has a category.
        by_key = {one["key"]: one for one in loaded_plain["answers"]}
        assert by_key == {one["key"]: one for one in all_three}

    def test_another_kind_of_file_is_refused(self):
        with pytest.raises(UserError, match=r"1b\.json is no result file of real_prompts"):
            load(ROOT / "benchmarks" / "results" / "twins-cpu-1b.json")
