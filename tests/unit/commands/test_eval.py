# SPDX-License-Identifier: Apache-2.0
"""Catch a `vllm-layerskip eval` that shows or stores something else than it measured, and mistakes
of a user that end in a traceback."""

import json
import math

import pytest
import torch
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from unit.evaluation.tiny_models import (
    FAMILIES,
    SHAPE,
    save,
    save_tokenizer,
    scores_by_definition,
    write_texts,
)
from unit.twins import adapters
from vllm_layerskip.commands import main as cli
from vllm_layerskip.evaluation import report as evaluation_report
from vllm_layerskip.evaluation.data import cut_windows, encode, read_documents

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two tiny models with one tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("one", "two")):
        save(FAMILIES["llama"], folder / name, seed)
        save_tokenizer(folder / name)
    return folder


@pytest.fixture
def texts(tmp_path):
    return write_texts(tmp_path / "texts")


def _eval(*argv):
    try:
        return cli.main(["eval", *map(str, argv)])
    except SystemExit as stop:  # argparse's own errors.
        return stop.code


def test_the_command_writes_table_json_and_plot(checkpoints, texts, tmp_path, capsys):
    out = {kind: tmp_path / f"result.{kind}" for kind in ("json", "md", "png", "svg", "pdf")}
    argv = ["--model", checkpoints / "one", "--compare", checkpoints / "two"]
    argv += ["--labels", "plain", "LayerSkip", "--data", texts, "--seq-len", 32, "--stride", 8]
    status = _eval(*argv, "--json", out["json"], "--markdown", out["md"], "--plot", out["png"])
    assert status == 0
    result = json.loads(out["json"].read_text())
    assert result["argv"][:4] == ["vllm-layerskip", "eval", "--model", str(checkpoints / "one")]
    assert set(result["versions"]) == {"vllm_layerskip", "python", "torch", "transformers"}
    # 260, 12 and 11 characters, each with a token before and one behind it.
    assert result["data"]["num_tokens"] == 260 + 12 + 11 + 3 * 2
    assert result["data"]["num_scored_tokens"] == result["data"]["num_tokens"] - 1
    assert [model["label"] for model in result["models"]] == ["plain", "LayerSkip"]
    assert [len(model["exits"]) for model in result["models"]] == [3, 3]
    assert result["models"][0]["exits"] != result["models"][1]["exits"]

    model = AutoModelForCausalLM.from_pretrained(checkpoints / "two").double().eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoints / "two")
    stream = encode(tokenizer, read_documents([str(texts)], "text"), "document", None).token_ids
    nll = []
    for end in range(1, len(stream)):  # What each token follows, by the definition of a stride.
        start = 0 if end < 32 else 8 * -(-(end + 1 - 32) // 8)
        with torch.no_grad():
            logits = model(torch.tensor([stream[start:end]]), use_cache=False).logits[0, -1]
        nll.append(-float(functional.log_softmax(logits, -1)[stream[end]]))
    expected = math.exp(sum(nll) / len(nll))
    assert result["models"][1]["exits"][-1]["perplexity"] == pytest.approx(expected, rel=1e-4)

    shown = capsys.readouterr().out
    row = evaluation_report.rows(result)[2]
    assert all(value in shown for value in ("layers", "plain perplexity", *row))
    assert out["md"].read_text().splitlines()[-1] == f"| {' | '.join(row)} |"
    for kind, head in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
        argv = ("--from-json", out["json"], "--plot", out[kind])
        assert _eval(*argv) == 0
        assert out[kind].read_bytes().startswith(head)


def test_a_stored_result_gives_the_same_table(checkpoints, texts, tmp_path, capsys):
    stored, table, again = tmp_path / "r.json", tmp_path / "1.md", tmp_path / "2.md"
    argv = ("--model", checkpoints / "one", "--data", texts, "--bos", "window", "--seq-len", 16)
    assert _eval(*argv, "--json", stored, "--markdown", table) == 0
    assert _eval("--from-json", stored, "--markdown", again) == 0
    assert table.read_text() == again.read_text()
    assert table.read_text().startswith("| layers | perplexity | accuracy | agreement |\n")
    data = json.loads(stored.read_text())["data"]
    assert data["num_scored_tokens"] == data["num_tokens"] == 283 + 3


def test_a_twin_is_scored_beside_its_model(checkpoints, texts, tmp_path, capsys):
    stored, plot = tmp_path / "r.json", tmp_path / "r.svg"
    argv = ["--model", checkpoints / "one", "--data", texts, "--seq-len", 32]
    twin = ["--draft-quantization", "int4", "--json", stored, "--plot", plot]
    assert _eval(*argv, "--json", tmp_path / "plain.json") == 0
    capsys.readouterr()
    assert _eval(*argv, *twin) == 0
    shown = " ".join(capsys.readouterr().out.split())
    plain = json.loads((tmp_path / "plain.json").read_text())["models"]
    model, twin = json.loads(stored.read_text())["models"]
    assert [model] == plain
    assert [model["label"], twin["label"]] == ["one", "one int4"]
    assert twin["twin"]["draft_quantization"] == "int4"
    assert twin["twin"]["draft_adapter"] is None
    assert twin["twin"]["not_quantized"] == [f"model.layers.{n}.mlp.down_proj" for n in range(3)]
    assert twin["exits"][-1]["exit_layer"] == 3
    assert 0.5 < twin["exits"][-1]["agreement"] < 1
    assert "'one int4' is a draft twin" in shown
    assert "one int4" in plot.read_text()
    assert _eval("--from-json", stored) == 0
    assert "'one int4' is a draft twin" in " ".join(capsys.readouterr().out.split())


def test_no_quantisation_is_no_twin(checkpoints, texts, tmp_path):
    argv = ("--model", checkpoints / "one", "--data", texts, "--json", tmp_path / "r.json")
    assert _eval(*argv, "--draft-quantization", "none", "--draft-adapter", "none") == 0
    assert len(json.loads((tmp_path / "r.json").read_text())["models"]) == 1


def test_a_twin_with_an_adapter(checkpoints, texts, tmp_path):
    tensors = {
        f"base_model.model.model.layers.0.mlp.up_proj.lora_{part}.weight": torch.ones(shape)
        for part, shape in (("A", (4, 32)), ("B", (48, 4)))
    }
    folder = adapters.write(tmp_path / "heal", tensors=tensors)
    argv = ("--model", checkpoints / "one", "--data", texts, "--draft-adapter", folder)
    assert _eval(*argv, "--json", tmp_path / "r.json") == 0
    model, twin = json.loads((tmp_path / "r.json").read_text())["models"]
    assert twin["label"] == "one adapter heal"
    assert twin["twin"]["draft_adapter"] == str(folder)
    assert len(twin["twin"]["adapter_digest"]) == 16
    assert model["exits"][-1]["agreement"] == 1
    assert twin["exits"][-1]["agreement"] < 1


def test_an_adapter_that_diverged_is_a_line(checkpoints, texts, tmp_path, capsys):
    tensors = {
        f"base_model.model.model.layers.0.mlp.up_proj.lora_{part}.weight": torch.full(
            shape, math.nan
        )
        for part, shape in (("A", (4, 32)), ("B", (48, 4)))
    }
    folder = adapters.write(tmp_path / "heal", tensors=tensors)
    argv = ("--model", checkpoints / "one", "--data", texts, "--draft-adapter", folder)
    assert _eval(*argv) == 2
    assert f"error: --draft-adapter {folder}: " in capsys.readouterr().err.splitlines()[-1]


def _config(folder, **changes):
    folder.mkdir(exist_ok=True)
    config = json.loads(LlamaConfig(**SHAPE, architectures=["LlamaForCausalLM"]).to_json_string())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


BAD = {
    "no folder": (["--model", "{tmp}/nowhere"], "nowhere': there is no such folder"),
    "classifier": (["--model", "{classifier}"], "is no decoder-only causal language model"),
    "encoder-decoder": (["--model", "{t5}"], "is no decoder-only causal language model"),
    "no tokenizer": (["--model", "{bare}"], "no tokenizer could be read"),
    "too long": (["--seq-len", "65"], "--seq-len 65 must be at most 64, the max_position_emb"),
    "too short": (["--seq-len", "1"], "--seq-len 1 must be at least 2"),
    "stride": (["--seq-len", "8", "--stride", "9"], "--stride 9 must be from 1 to 8"),
    "stride beside bos": (
        ["--seq-len", "8", "--stride", "8", "--bos", "window"],
        "--stride 8 must be from 1 to 7",
    ),
    "no data": (["--data", "{tmp}/none.txt"], "--data {tmp}/none.txt: there is no such file"),
    "empty data": (["--data", "{empty}"], "--data {empty}: there is no text in it"),
    "binary data": (["--data", "{binary}"], "{binary}: this is no UTF-8 text"),
    "bad line": (["--data", "{lines}"], "{lines}, line 2: there is no text"),
    "other tokenizer": (["--compare", "{other}"], "its tokenizer is not that of"),
    "labels": (["--labels", "a", "b"], "there must be 1, one for each model"),
    "same labels": (["--compare", "{two}", "--labels", "a", "a"], "they must differ"),
    "twin kind": (["--draft-quantization", "int3"], "invalid choice: 'int3'"),
    "twin and compare": (
        ["--compare", "{two}", "--draft-quantization", "int8"],
        "--compare and --draft-quantization int8 exclude each other",
    ),
    "no adapter": (
        ["--draft-adapter", "{tmp}/none"],
        "--draft-adapter {tmp}/none: there is no folder '{tmp}/none'. Give one with",
    ),
    "adapter of another model": (
        ["--draft-adapter", "{adapter}"],
        "--draft-adapter {adapter}: it was made for 'acme/tiny', and the target is",
    ),
    "device": (["--device", "nodevice"], "--device nodevice: "),
    "plot format": (["--plot", "{tmp}/x.gif"], "must end with one of .pdf, .png, .svg"),
    "output folder": (["--json", "{tmp}/no/r.json"], "must be a file in a folder that exists"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_explained_in_a_line(case, checkpoints, texts, tmp_path, capsys):
    places = {"tmp": tmp_path, "two": checkpoints / "two"}
    places["adapter"] = adapters.write(tmp_path / "adapter", tensors=adapters.weights(num_layers=4))
    for name in ("classifier", "t5", "bare", "other"):
        places[name] = tmp_path / name
    _config(places["classifier"], architectures=["LlamaForSequenceClassification"])
    places["t5"].mkdir()
    (places["t5"] / "config.json").write_text(
        '{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}'
    )
    _config(places["bare"])
    _config(places["other"])
    save_tokenizer(places["other"], alphabet="jihgfedcba \n")
    for name, content in (("empty", b" \n"), ("binary", b"\xff\xfe"), ("lines", b'"a"\n{"x": 1}')):
        places[name] = tmp_path / (name + (".jsonl" if name == "lines" else ".txt"))
        places[name].write_bytes(content)
    extra, message = BAD[case]
    argv = ["--model", checkpoints / "one", "--data", texts, *(a.format(**places) for a in extra)]
    assert _eval(*argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("vllm-layerskip eval: error: ")
    assert message.format(**places) in error


def test_missing_weights_are_no_random_exits(tmp_path, texts, capsys):
    from safetensors.torch import load_file, save_file

    folder = save(FAMILIES["llama"], tmp_path / "m")
    save_tokenizer(folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert _eval("--model", folder, "--data", texts) == 2
    assert "1 weights are missing, model.layers.1.mlp.up_proj.weight" in capsys.readouterr().err


@pytest.mark.parametrize("config", ["gemma2", "granite"])
def test_capped_and_scaled_logits_are_the_models_own(config, tmp_path, texts):
    configs = {
        "gemma2": Gemma2Config(**SHAPE, final_logit_softcapping=2.0, tie_word_embeddings=True),
        "granite": GraniteConfig(**SHAPE, logits_scaling=4.0),
    }
    folder = save(configs[config], tmp_path / "m")
    save_tokenizer(folder)
    stored = tmp_path / "r.json"
    assert _eval("--model", folder, "--data", texts, "--seq-len", 32, "--json", stored) == 0
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    stream = encode(tokenizer, read_documents([str(texts)], "text"), "document", None).token_ids
    windows, scored = cut_windows(stream, 32, 32)
    scores = json.loads(stored.read_text())["models"][0]["exits"]
    expected = scores_by_definition(model, windows, scored)
    for score, (perplexity, accuracy, agreement) in zip(scores, expected, strict=True):
        assert score["perplexity"] == pytest.approx(perplexity, rel=1e-4)
        assert score["accuracy"] == pytest.approx(accuracy)
        assert score["agreement"] == pytest.approx(agreement)


def test_another_head_than_the_models_is_refused(checkpoints, texts, monkeypatch, capsys):
    from vllm_layerskip.evaluation import scores as evaluate

    exit_logits = evaluate.exit_logits
    monkeypatch.setattr(evaluate, "exit_logits", lambda *args: 1.01 * exit_logits(*args))
    assert _eval("--model", checkpoints / "one", "--data", texts) == 2
    assert "are not those of its final norm and LM head" in capsys.readouterr().err


def test_a_model_without_layers_and_norm_is_refused(tmp_path, texts, capsys):
    from transformers import GPTNeoXConfig

    config = GPTNeoXConfig(
        vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    folder = save(config, tmp_path / "m")
    save_tokenizer(folder)
    assert _eval("--model", folder, "--data", texts) == 2
    assert "GPTNeoXForCausalLM has no model.layers" in capsys.readouterr().err


def test_from_json_measures_nothing(tmp_path, capsys):
    (tmp_path / "other.json").write_text("{}")
    assert _eval("--from-json", tmp_path / "other.json") == 2
    assert "is no result" in capsys.readouterr().err
    assert _eval("--from-json", tmp_path / "other.json", "--data", "stdlib") == 2
    assert "--data and --from-json exclude each other" in capsys.readouterr().err
    assert _eval("--from-json", tmp_path / "other.json", "--draft-quantization", "int4") == 2
    assert "--draft-quantization and --from-json exclude each" in capsys.readouterr().err
