# SPDX-License-Identifier: Apache-2.0
"""The step ``real-model`` of a GPU session: what is carried, and parts that watch the clock."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.gpu import acceptance, carry_model, draft_adapter, gpu_session, self_chats, steps
from benchmarks.gpu.summary import summary
from benchmarks.prompts import real_prompts
from benchmarks.prompts import records as prompt_records
from vllm_layerskip import embedded_checkpoint
from vllm_layerskip.commands import main as command
from vllm_layerskip.config.options import resolve_options
from vllm_layerskip.errors import UserError
from vllm_layerskip.example_model import pinned


@pytest.fixture
def carried(tmp_path, monkeypatch):
    """Both parts of a small model, made as ``--out`` makes them."""
    model, package = tmp_path / "model.whl", tmp_path / "small-1.0-py3-none-any.whl"
    model.write_bytes(bytes(range(256)) * 40)
    with zipfile.ZipFile(package, "w") as archive:
        archive.writestr("small/__init__.py", "x = 1\n")
    questions = tmp_path / "all.jsonl"
    questions.write_text("{}\n")
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    monkeypatch.setattr(carry_model, "WHEEL", replace(pinned.WHEEL, sha256=digest))
    carry_model.pack(model, [package], questions, tmp_path / "out")
    return SimpleNamespace(model=model, out=tmp_path / "out", to=tmp_path / "to", at=tmp_path)


def bring(carried, part):
    """Carry one part, as a call of the device tool does: the other is not there."""
    source = carried.at / f"call-{part}"
    source.mkdir()
    (carried.out / part).rename(source / part)
    return carry_model.arrive(source, carried.to)


class TestCarrying:
    @pytest.mark.parametrize("first", carry_model.PARTS)
    def test_two_calls_bring_the_whole(self, carried, first):
        (second,) = set(carry_model.PARTS) - {first}
        assert bring(carried, first) == [second]
        assert not (carried.to / carry_model.WHEEL_NAME).exists()
        assert bring(carried, second) == []
        assert (carried.to / carry_model.WHEEL_NAME).read_bytes() == carried.model.read_bytes()
        assert (carried.to / "site" / "small" / "__init__.py").exists()
        assert (carried.to / carry_model.QUESTIONS_NAME).read_text() == "{}\n"

    def test_parts_are_of_one_size_and_git_does_not_see_them(self, carried):
        sizes = [
            sum(file.stat().st_size for file in (carried.out / part).glob("*.whl*"))
            for part in carry_model.PARTS
        ]
        assert abs(sizes[0] - sizes[1]) <= 1
        assert (carried.out / ".gitignore").read_text() == "*\n"

    def test_a_damaged_part_is_refused(self, carried):
        (carried.out / "b" / f"{carry_model.WHEEL_NAME}.1").write_bytes(b"x")
        bring(carried, "a")
        with pytest.raises(UserError, match="is damaged, or of another build"):
            bring(carried, "b")

    def test_a_part_of_another_build_is_asked_for_again(self, carried):
        bring(carried, "a")
        kept = carried.to / "parts" / f"{carry_model.WHEEL_NAME}.0"
        kept.write_bytes(b"of yesterday")
        assert bring(carried, "b") == ["a"]
        assert not kept.exists()

    def test_nothing_arrived(self, tmp_path):
        with pytest.raises(UserError, match="there is no part in it"):
            carry_model.arrive(tmp_path, tmp_path / "to")

    def test_a_part_that_cannot_travel(self, carried, monkeypatch):
        monkeypatch.setattr(carry_model, "MOST_BYTES", 1000)
        with pytest.raises(UserError, match="part a has 0.0 MB, and only 50 can travel"):
            carry_model.pack(carried.model, [], None, carried.out)

    def test_the_command_waits_with_status_3(self, carried):
        """And needs no package but the standard library's."""
        source = carried.at / "call"
        source.mkdir()
        (carried.out / "a").rename(source / "a")
        process = subprocess.run(
            [sys.executable, "-S", "-m", "benchmarks.gpu.carry_model",
             "--arrive", str(source), "--to", str(carried.to)],
            capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3],
            env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        )  # fmt: skip
        assert (process.returncode, process.stdout) == (3, "waiting for part b\n"), process.stderr


class TestSteps:
    @pytest.fixture(params=[False, True], ids=["gpu", "tiny"])
    def parts(self, request, tmp_path):
        make = steps.PartMaker(tmp_path, request.param, None, carried=tmp_path / "carried")
        return {part.name: part.command for part in steps.real_model(make)}

    def test_the_order_of_worth(self, parts):
        assert list(parts) == ["convert", "chats", "adapter", "accept", "accept-f32"]

    def test_one_parts_output_is_the_nexts_input(self, parts):
        def value(name, option):
            return parts[name][parts[name].index(option) + 1]

        folder = parts["convert"][4]
        assert {value(name, "--model") for name in ("chats", "adapter", "accept")} == {folder}
        assert value("adapter", "--chats") == value("chats", "--output")
        assert value("accept", "--adapter") == value("adapter", "--output")
        assert value("accept", "--questions") == value("chats", "--exclude")
        assert value("accept", "--output") != value("accept-f32", "--output")

    def test_self_chats_takes_its_options(self, parts):
        folder = Path(parts["convert"][4])
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        options = parts["chats"][parts["chats"].index("--") + 1 :]
        args = command.build_parser().parse_args(["self-chats", "--output", "x.jsonl", *options])
        assert args.keep_unfinished, "the target stays frozen"
        assert args.exclude

    def test_without_the_model_there_is_no_step(self, tmp_path):
        for step in (steps.real_model, steps.real_model_float32):
            with pytest.raises(UserError, match="the model has not arrived"):
                step(steps.PartMaker(tmp_path, False, None))

    def test_packages_that_were_carried_are_found(self, tmp_path, monkeypatch):
        (tmp_path / "site").mkdir()
        monkeypatch.setattr(carry_model, "default_folder", lambda: tmp_path)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "environ", dict(os.environ))
            gpu_session.prepare_environment(tmp_path / "results", tiny=False)
            assert str(tmp_path / "site") in os.environ["PYTHONPATH"].split(os.pathsep)


class TestSelfChats:
    def test_the_command_ends_in_time(self, tmp_path, monkeypatch):
        output = tmp_path / "chats.jsonl"
        arguments = ["--time-limit", "75", "--output", str(output), "--", "--num-chats", "9"]
        monkeypatch.setattr(sys, "argv", ["self_chats.py", *arguments])
        given = []
        monkeypatch.setattr(command, "main", lambda argv: given.append(argv) or 7)
        assert self_chats.main() == 7
        ((*rest, option, minutes, wanted, count),) = given
        assert rest == ["self-chats", "--output", str(output)]
        assert (option, wanted, count) == ("--max-minutes", "--num-chats", "9")
        assert float(minutes) == pytest.approx(1, abs=0.1), "15 s are for what comes behind"

    def test_what_is_there_is_not_made_again(self, tmp_path, monkeypatch, capsys):
        output = tmp_path / "chats.jsonl"
        output.write_text("")
        arguments = ["--time-limit", "9", "--output", str(output), "--", "--model", "x"]
        monkeypatch.setattr(sys, "argv", ["self_chats.py", *arguments])
        assert self_chats.main() == 0
        assert "is there already" in capsys.readouterr().out


class TestDraftAdapter:
    @pytest.fixture
    def args(self, tmp_path):
        return argparse.Namespace(
            model=tmp_path / "model", chats=tmp_path / "chats.jsonl", output=tmp_path / "adapter",
            max_steps=None, tiny=False,
        )  # fmt: skip

    def test_the_config_gets_places_and_sizes(self, args):
        config = draft_adapter.config_of(args)
        assert config.model.path == str(args.model)
        assert config.data.train.files == (str(args.chats),)
        assert config.output.folder == args.output
        assert config.output.dtype == "bfloat16", "16 MiB of a file come back"
        assert (config.recipe.exit_layer, config.recipe.num_speculative_tokens) == (12, 4)
        assert config.recipe.num_speculative_tokens == acceptance.K
        args.tiny, args.max_steps = True, 2
        tiny = draft_adapter.config_of(args)
        assert (tiny.data.seq_len, tiny.training["max_steps"]) == (128, 2)

    def test_the_learning_rate_follows_the_clock(self):
        clock = draft_adapter.Clock(time.monotonic() + 100)
        assert 0 < clock(0) < clock(10) < clock(draft_adapter.WARMUP_STEPS) <= 1
        clock.start -= 100
        assert clock(50) == pytest.approx(0.5, abs=0.01), "half of the time is over"
        assert draft_adapter.Clock(time.monotonic())(50) == pytest.approx(0, abs=1e-6)

    def test_an_adapter_names_its_model_and_no_place(self, tmp_path):
        folder, place = tmp_path / "adapter", "/tmp/results/SmolLM2"
        folder.mkdir()
        for name in ("README.md", "adapter_config.json", draft_adapter.RECORD):
            (folder / name).write_text(f"a draft for {place}, exit 12")
        draft_adapter.name_base(folder, place)
        draft_adapter.pack(folder, tmp_path / "adapter.tar.gz")
        with tarfile.open(tmp_path / "adapter.tar.gz") as tar:
            assert f"adapter/{draft_adapter.RECORD}" in tar.getnames()
            text = tar.extractfile("adapter/README.md").read().decode()
        assert text == f"a draft for {pinned.ORIGIN}, exit 12"

    def test_a_run_that_the_time_ends(self, tmp_path, monkeypatch):
        """Of the embedded checkpoint; scores and the adapter are written all the same."""
        chats = tmp_path / "chats.jsonl"
        lines = [json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n"}) for i in range(200)]
        chats.write_text("\n".join(lines))
        read = draft_adapter.config_of

        def smaller(args):
            config = read(args)
            return replace(config, recipe=replace(config.recipe, exit_layer=3))

        monkeypatch.setattr(draft_adapter, "config_of", smaller)
        files = {name: tmp_path / name for name in ("adapter", "adapter.tar.gz", "facts.json")}
        options = [
            *("--model", str(embedded_checkpoint()), "--chats", str(chats), "--tiny"),
            *("--time-limit", "21", "--output", str(files["adapter"])),
            *("--archive", str(files["adapter.tar.gz"]), "--facts", str(files["facts.json"])),
        ]
        monkeypatch.setattr(sys, "argv", ["draft_adapter.py", *options])
        draft_adapter.main()
        facts = json.loads(files["facts.json"].read_text())
        assert 1 <= facts["num_steps"] < 1000
        assert facts["adapter"]["exit_layer"] == 3
        assert "Predicted acceptance length" in summary_of(tmp_path, facts)
        assert (files["adapter"] / "adapter_model.safetensors").exists()
        before = files["adapter.tar.gz"].stat().st_mtime_ns
        draft_adapter.main()
        assert files["adapter.tar.gz"].stat().st_mtime_ns == before, "trained already"


def summary_of(folder, facts):
    (folder / "real-adapter.json").write_text(json.dumps(facts))
    return summary(folder)


class TestAcceptance:
    def test_four_modes_with_an_adapter_and_two_without(self, tmp_path):
        names = [one.partition("=")[0] for one in acceptance.drafts(tmp_path)]
        assert names == ["int4"]
        (tmp_path / acceptance.RECORD).write_text('{"exit_layer": 12}')
        names = [one.partition("=")[0] for one in acceptance.drafts(tmp_path)]
        assert names == ["adapter", "int4", "adapter int4"]

    @pytest.mark.parametrize("tiny", [False, True])
    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_real_prompts_takes_its_arguments(self, tiny, dtype, tmp_path):
        (tmp_path / acceptance.RECORD).write_text('{"exit_layer": 3}')
        args = argparse.Namespace(
            model=embedded_checkpoint(), adapter=tmp_path, questions=Path("q"), dtype=dtype,
            output=Path("o.json"), tiny=tiny,
        )  # fmt: skip
        parsed = real_prompts.build_parser().parse_args(acceptance.command(args))
        assert parsed.chat
        assert parsed.max_tokens + acceptance.K < parsed.max_model_len
        assert ("attention_backend" in parsed.engine_args) == (dtype == "float32" and not tiny)
        found = [resolve_options(config, 12, None) for _, config in parsed.drafts]
        assert [(one.exit_layer, one.draft_quantization) for one in found] == [
            (3, "none"), (12, "int4"), (3, "int4")
        ]  # fmt: skip
        assert all(one.num_speculative_tokens == acceptance.K for one in found)

    def test_the_summary_has_every_mode(self, tmp_path):
        def record(mode, drafts, accepted):
            answer = {
                "key": "1#0", "question": "1", "category": "qa", "num_tokens": 41,
                "num_steps": 40 - accepted, "num_accepted_tokens": accepted, "output": "abcdef",
                "same_in_every_run": True, "tpot_ms": [1.0], "total_ms": [41.0],
            }  # fmt: skip
            return {
                "mode": mode, "answers": [answer], "drafts": drafts and {"name": drafts},
                "settings": {"batch_size": 16, "dtype": "float32", "num_speculative_tokens": 4,
                             "exit_layer": 12},
                "sampling": {"temperature": 0}, "runs_tokens_per_s": [1234.4],
                "num_accepted_at": [accepted] if accepted else [],
            }  # fmt: skip

        records = [record("plain", None, 0), record("layerskip", "adapter int4", 20)]
        prompt_records.save(tmp_path / "real-float32.json", records)
        text = summary(tmp_path)
        assert "| layerskip, adapter int4 | 1 | 2.00 | 1 of 1 | 1234 |" in text
        assert "| plain | 1 |  | 1 of 1 | 1234 |" in text
