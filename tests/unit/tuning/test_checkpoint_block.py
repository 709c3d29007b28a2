# SPDX-License-Identifier: Apache-2.0
"""Catch a config.json that tuning breaks, half writes, or empties of what else it said."""

import json
import os
from dataclasses import replace

import pytest

from vllm_layerskip.config.options import resolve_options
from vllm_layerskip.errors import UserError
from vllm_layerskip.tuning.checkpoint_block import (
    check_writable,
    path_in_checkpoint,
    read_config,
    tuned_block,
    write_config,
)
from vllm_layerskip.tuning.drafts import Draft
from vllm_layerskip.tuning.schedule import Choice

CHOICE = Choice(3, 5, ((1, 4, 5), (5, 16, 0)), {1: 1.4, 16: 1.0})
CONFIG = {"num_hidden_layers": 12, "layerskip": {"exit_layer": 1, "recipe": {"rotation": 3}}}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


def test_auto_resolves_to_the_choice():
    block = tuned_block({"draft_vocab": "ids.json"}, CHOICE, {"device": "here"})
    options = resolve_options({"method": "layerskip"}, 12, json.loads(json.dumps(block)))
    assert (options.exit_layer, options.num_speculative_tokens) == (3, 5)
    assert options.vllm_options == {
        "num_speculative_tokens_per_batch_size": [(1, 4, 5), (5, 16, 0)]
    }
    assert options.draft_vocab.path == "ids.json"


def test_what_else_the_block_says_stays():
    block = tuned_block(CONFIG["layerskip"], CHOICE, {"device": "here"})
    assert block["recipe"] == {"rotation": 3}
    assert block["tuning"] == {"device": "here"}
    assert tuned_block(None, CHOICE, {})["exit_layer"] == 3


def test_a_twin_is_written_and_the_next_choice_takes_it_out():
    twin = replace(CHOICE, exit_layer=12, draft=Draft("int4", "abc"))
    block = tuned_block(CONFIG["layerskip"], twin, {}, "adapters/e12")
    options = resolve_options({"method": "layerskip"}, 12, json.loads(json.dumps(block)))
    assert (options.exit_layer, options.draft_quantization) == (12, "int4")
    assert options.draft_adapter.path == "adapters/e12"
    options = resolve_options({"method": "layerskip"}, 12, tuned_block(block, CHOICE, {}))
    assert not options.has_twin


def test_a_path_inside_the_checkpoint_is_relative_to_it(tmp_path, monkeypatch):
    inside, outside = tmp_path / "model" / "adapters" / "e3", tmp_path / "model-e3"
    inside.mkdir(parents=True)
    outside.mkdir()
    model = str(tmp_path / "model")
    assert path_in_checkpoint(model, str(inside)) == "adapters/e3"
    assert path_in_checkpoint(model, str(outside)) is None
    assert path_in_checkpoint(model, model) is None
    assert path_in_checkpoint("name/on-the-hub", str(inside)) is None
    monkeypatch.chdir(tmp_path)
    assert path_in_checkpoint("model", "model/adapters/e3") == "adapters/e3"


def test_the_first_original_is_kept(path):
    path.chmod(0o640)
    backup = write_config(path, {"num_hidden_layers": 1}, backup=True)
    assert backup == path.with_name("config.json.before-tune")
    assert json.loads(backup.read_text()) == CONFIG
    write_config(path, {"num_hidden_layers": 2}, backup=True)
    assert json.loads(backup.read_text()) == CONFIG
    assert json.loads(path.read_text()) == {"num_hidden_layers": 2}
    assert path.stat().st_mode & 0o777 == 0o640
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, backup.name]


def test_the_backup_has_the_originals_permissions_and_time(path):
    os.utime(path, ns=(10**18, 10**18))
    path.chmod(0o440)
    backup = write_config(path, {"num_hidden_layers": 1}, backup=True)
    assert backup.stat().st_mode & 0o777 == 0o440
    assert backup.stat().st_mtime_ns == 10**18
    assert path.stat().st_mode & 0o777 == 0o440


def test_another_file_is_written_without_a_backup(tmp_path):
    assert write_config(tmp_path / "new.json", CONFIG, backup=False) is None
    assert [p.name for p in tmp_path.iterdir()] == ["new.json"]


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_failure_leaves_the_old_file_whole(path, monkeypatch, call):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(UserError, match=r"No space left on device.*--output FILE.*--dry-run"):
        write_config(path, {"num_hidden_layers": 2}, backup=False)
    assert json.loads(path.read_text()) == CONFIG
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_place_that_cannot_be_written_is_found_early(tmp_path, path, monkeypatch):
    check_writable(path, "--model")
    check_writable(tmp_path / "new.json", "--output")
    for wrong in (tmp_path, tmp_path / "no" / "such.json"):
        with pytest.raises(UserError, match=r"--output: .* cannot be written .*--dry-run"):
            check_writable(wrong, "--output")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(UserError, match=r"--model: .*Permission denied.*Give --output FILE"):
        check_writable(path, "--model")


@pytest.mark.parametrize("content", [None, "", "{", "[1]"])
def test_a_folder_that_is_no_checkpoint(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"--model .*config\.json"):
        read_config(str(tmp_path))
