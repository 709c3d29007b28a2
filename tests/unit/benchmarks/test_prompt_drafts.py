# SPDX-License-Identifier: Apache-2.0
"""Drafts as data: ``--drafts NAME=JSON`` of benchmarks.prompts.real_prompts."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from types import SimpleNamespace

import pytest

from benchmarks.prompts import measure, real_prompts
from benchmarks.prompts.drafts import all_drafts, drafts_of_checkpoint, named_config
from benchmarks.prompts.jobs import Run, jobs, modes_with_drafts
from benchmarks.prompts.summary import label
from unit.twins import adapters
from vllm_layerskip import embedded_checkpoint
from vllm_layerskip.config.options import resolve_options
from vllm_layerskip.errors import UserError

from .records import SPEC_BENCH, write_lines

EMBEDDED = embedded_checkpoint()
CONFIG = {"num_hidden_layers": 12, "vocab_size": 100}
EARLY = {"exit_layer": 3, "num_speculative_tokens": 5}
EVERY = {"exit_layer": "all", "num_speculative_tokens": 4, "draft_quantization": "int4"}


def resolve(name, request, config=CONFIG):
    (drafts,) = all_drafts([(name, request)], EMBEDDED, config)
    return drafts


class TestNames:
    def test_a_name_and_keys(self):
        text = f"int4 all={json.dumps(EVERY)}"
        assert named_config(text) == ("int4 all", EVERY)

    @pytest.mark.parametrize(
        ("text", "error"),
        [
            ("int4", "'int4' must be NAME=JSON"),
            ("={}", "must be NAME=JSON"),
            ("a|b={}", "must be NAME=JSON, with a name of letters"),
            ("a, b={}", "must be NAME=JSON"),
            ("a={", "a: '{' is no JSON"),
            ("a=[]", "a: '[]' must be a JSON object of speculative_config's keys"),
        ],
    )
    def test_another_form_is_refused(self, text, error):
        with pytest.raises(argparse.ArgumentTypeError, match=re.escape(error)):
            named_config(text)

    def test_names_must_differ(self):
        with pytest.raises(UserError, match="--drafts a is there twice. Make names differ"):
            all_drafts([("a", EARLY), ("b", EARLY), ("a", EVERY)], EMBEDDED, CONFIG)


class TestChecks:
    def test_every_default_is_written_out(self):
        early, every = resolve("early", EARLY), resolve("every", EVERY)
        off = {"draft_adapter": "none", "draft_vocab": "none"}
        assert early.config == EARLY | off | {
            "draft_quantization": "none", "reuse_exit_states": True,
        }  # fmt: skip
        assert (early.pair, early.reuses, early.has_all_layers) == ((3, 5), True, False)
        assert every.config == EVERY | off
        assert (every.pair, every.reuses, every.has_all_layers) == ((12, 4), False, True)
        assert every.facts() == {"name": "every", "config": every.config}

    @pytest.mark.parametrize("request_", [EARLY, EVERY, EVERY | {"exit_layer": 12}])
    def test_what_is_written_out_means_the_same(self, request_):
        """Also for a checkpoint whose block names something else."""
        block = {"draft_quantization": "int8", "draft_adapter": "a", "draft_vocab": "v.json"}
        explicit = resolve("x", request_).config
        found, meant = resolve_options(explicit, 12, block), resolve_options(request_, 12, None)
        for name in (
            "exit_layer", "num_speculative_tokens", "draft_quantization", "draft_adapter",
            "draft_vocab", "reuse_exit_states",
        ):  # fmt: skip
            assert getattr(found, name) == getattr(meant, name)

    def test_a_draft_vocabulary_is_read(self, tmp_path):
        path = tmp_path / "ids.json"
        path.write_text("[3, 1]")
        assert resolve("x", EARLY | {"draft_vocab": str(path)}).config["draft_vocab"] == str(path)
        path.write_text("[3, 100]")
        with pytest.raises(UserError, match=r"--drafts x: .*token id 100 is not in"):
            resolve("x", EARLY | {"draft_vocab": str(path)})

    def test_an_adapter_is_read_and_known_by_its_content(self, tmp_path):
        model, folder = tmp_path / "model", adapters.write(tmp_path / "adapter")
        adapters.BASE.save_pretrained(model)
        config = json.loads((model / "config.json").read_text())
        request = {"exit_layer": 2, "num_speculative_tokens": 4, "draft_adapter": str(folder)}
        (drafts,) = all_drafts([("x", request)], model, config)
        assert drafts.config["draft_adapter"] == str(folder)
        assert not drafts.reuses
        assert drafts.facts()["adapter_digest"] == adapters.read(folder).digest
        with pytest.raises(UserError, match=r"--drafts x: .*draft_adapter="):
            all_drafts([("x", request | {"exit_layer": 1})], model, config)

    def test_an_adapters_folder_must_be_there(self, tmp_path):
        with pytest.raises(UserError, match=r"--drafts x: .*draft_adapter=.*there is no folder"):
            resolve("x", EARLY | {"draft_adapter": str(tmp_path / "none")})

    @pytest.mark.parametrize(
        ("request_", "error"),
        [
            (EARLY | {"exit_layer": 12}, "exit_layer=12 must be an integer from 1 to 11"),
            ({"exit_layer": "all", "num_speculative_tokens": 4}, "exit_layer='all' must be"),
            (EARLY | {"num_speculative_tokens": 0}, "num_speculative_tokens=0 must be"),
            (EARLY | {"draft_quantization": "int3"}, "draft_quantization='int3' must be one of"),
            (EARLY | {"draft_bits": 4}, "draft_bits=4 cannot be used with LayerSkip"),
            (EARLY | {"method": "ngram"}, "method='ngram' cannot be used: these are LayerSkip's"),
            (EVERY | {"reuse_exit_states": True}, "reuse_exit_states=True cannot go with"),
            ({"exit_layer": 3}, "num_speculative_tokens is not set"),
            (EARLY | {"rejection_sample_method": "synthetic"}, "sets acceptance, which is what"),
            (EARLY | {"synthetic_acceptance_length": 2.5}, "sets acceptance, which is what"),
        ],
    )
    def test_what_layerskip_would_refuse_is_an_error_that_names_the_drafts(self, request_, error):
        with pytest.raises(UserError, match=f"--drafts mine: .*{re.escape(error)}"):
            resolve("mine", request_)


class TestCheckpointsBlock:
    def test_all_layers(self):
        """As `tune` and people write it for a model without training."""
        drafts = drafts_of_checkpoint(EMBEDDED, CONFIG | {"layerskip": EVERY})
        assert drafts.name == "E = all, K = 4, int4"
        assert drafts.pair == (12, 4)

    def test_none(self):
        with pytest.raises(UserError, match="--pairs: .* has no layerskip block. Give E:K, or"):
            drafts_of_checkpoint(EMBEDDED, CONFIG)

    def test_a_wrong_one(self):
        block = {"exit_layer": "all", "num_speculative_tokens": 4}
        with pytest.raises(UserError, match=r"--model: config.json, .* exit_layer='all'"):
            drafts_of_checkpoint(EMBEDDED, CONFIG | {"layerskip": block})

    def test_jobs_of_a_copy_with_such_a_block(self, tmp_path):
        model = shutil.copytree(EMBEDDED, tmp_path / "model")
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"layerskip": EVERY}))
        path = write_lines(tmp_path / "q.jsonl", SPEC_BENCH)
        argv = ["--model", str(model), "--questions", str(path)]
        (plain, ours), left_out = jobs(real_prompts.build_parser().parse_args(argv))
        assert left_out == []
        assert plain["drafts"] is None
        assert ours["drafts"]["config"]["exit_layer"] == "all"
        assert ours["settings"]["exit_layer"] == 12
        assert ours["settings"]["draft_quantization"] == "int4"
        assert label(ours) == "layerskip, E = all, K = 4, int4"


class TestModes:
    TWIN = resolve("twin", EARLY | {"draft_quantization": "int8"})
    EARLY, EVERY = resolve("early", EARLY), resolve("every", EVERY)

    def test_other_methods_run_once_for_what_they_depend_on(self):
        modes = ["plain", "layerskip", "draft-model", "ngram"]
        runs, left_out = modes_with_drafts(modes, [self.EARLY, self.TWIN, self.EVERY])
        assert runs == [
            Run("plain", (0, 0)),
            Run("layerskip", (3, 5), self.EARLY),
            Run("layerskip", (3, 5), self.TWIN),
            Run("layerskip", (12, 4), self.EVERY),
            Run("draft-model", (3, 5)),
            Run("ngram", (0, 5)),
            Run("ngram", (0, 4)),
        ]
        (reason,) = left_out
        assert reason.startswith("draft-model: none for every, whose drafts have all layers")

    def test_without_reuse_where_there_is_some(self):
        runs, left_out = modes_with_drafts(
            ["layerskip-no-reuse"], [self.EARLY, self.TWIN, self.EVERY]
        )
        assert [run.drafts.config["reuse_exit_states"] for run in runs] == [False]
        assert len(left_out) == 2

    def test_a_vocabulary_belongs_to_the_drafts(self, tmp_path):
        path = write_lines(tmp_path / "q.jsonl", SPEC_BENCH)
        argv = ["--model", str(EMBEDDED), "--questions", str(path), "--draft-vocab", "9"]
        argv += ["--drafts", f"x={json.dumps(EARLY)}"]
        with pytest.raises(UserError, match="--draft-vocab 9 goes with --pairs"):
            jobs(real_prompts.build_parser().parse_args(argv))


def test_an_engine_gets_the_drafts_as_they_are(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "q.jsonl", SPEC_BENCH)
    argv = ["--model", str(EMBEDDED), "--questions", str(path), "--drafts"]
    argv += [f"every={json.dumps(EVERY)}", "--device", "cpu"]
    (plain, ours), _ = jobs(real_prompts.build_parser().parse_args(argv))
    given = []
    monkeypatch.setattr("vllm.LLM", lambda **arguments: given.append(SimpleNamespace(**arguments)))
    for job in (plain, ours):
        settings = measure.Settings(**job["settings"])
        measure._start_engine(settings, job, tmp_path)
    assert given[0].speculative_config is None
    assert given[1].speculative_config == {"method": "layerskip", **ours["drafts"]["config"]}
    assert given[0].max_model_len == given[1].max_model_len == 512
