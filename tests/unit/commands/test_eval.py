# SPDX-License-Identifier: Apache-2.0
"""Catch scores of `vllm-layerskip eval` that are not what their definition says, tokens that count
twice or not at all, and mistakes of a user that end in a traceback."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

import vllm_layerskip
from vllm_layerskip.commands import main as cli
from vllm_layerskip.errors import UserError
from vllm_layerskip.evaluation import data as evaluation_data
from vllm_layerskip.evaluation import report as evaluation_report
from vllm_layerskip.evaluation.data import Document, cut_windows, encode, read_documents
from vllm_layerskip.evaluation.scores import score_exits

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
FAMILIES = {
    "llama": LlamaConfig(**SHAPE),
    "llama-tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "mistral": MistralConfig(**SHAPE, sliding_window=8),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE),
}

pytestmark = pytest.mark.usefixtures("one_thread")


def _save(config, folder, seed=0):
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    return folder


def _save_tokenizer(folder, alphabet="abcdefghij \n", bos="<s>", eos="</s>"):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    specials = [token for token in (bos, eos) if token]
    vocab = {token: index for index, token in enumerate([*specials, "<unk>", *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return fast


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two tiny models with one tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("one", "two")):
        _save(FAMILIES["llama"], folder / name, seed)
        _save_tokenizer(folder / name)
    return folder


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("abc def ghij\n" * 20)
    (folder / "b.jsonl").write_text('{"text": "jihg fed cba"}\n"a b c d e f"\n')
    return folder


def _eval(*argv):
    return cli.main(["eval", *map(str, argv)])


@torch.no_grad()
def _reference(model, windows, scored):
    """Each exit as a model of its own, its layers above removed; token by token."""
    layers = model.model.layers
    logits = []
    for num_layers in range(1, len(layers) + 1):
        model.model.layers = layers[:num_layers]
        logits.append(model(windows, use_cache=False).logits.double())
    model.model.layers = layers
    scores = []
    for exit_logits in logits:
        nll, correct, agreeing = [], [], []
        for row, column in scored.nonzero().tolist():
            if column == 0:
                continue
            at = row, column - 1
            token = int(windows[row, column])
            nll.append(-float(functional.log_softmax(exit_logits[at], -1)[token]))
            correct.append(int(exit_logits[at].argmax()) == token)
            agreeing.append(int(exit_logits[at].argmax()) == int(logits[-1][at].argmax()))
        count = len(nll)
        scores.append((math.exp(sum(nll) / count), sum(correct) / count, sum(agreeing) / count))
    return scores


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("logits_at_once", [1 << 25, 40 * 7])
def test_every_exit_is_scored_as_a_model_of_its_own(family, logits_at_once, monkeypatch):
    monkeypatch.setattr("vllm_layerskip.evaluation.scores._LOGITS_AT_ONCE", logits_at_once)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]).double().eval()
    windows = torch.randint(0, SHAPE["vocab_size"], (5, 20))
    scored = torch.rand(5, 20) < 0.6
    scores = score_exits(model, windows, 2, scored=scored)
    expected = _reference(model, windows, scored)
    for score, (perplexity, accuracy, agreement) in zip(scores, expected, strict=True):
        assert score.perplexity == pytest.approx(perplexity, rel=1e-5)
        assert score.accuracy == pytest.approx(accuracy)
        assert score.agreement == pytest.approx(agreement)
    assert [score.exit_layer for score in scores] == [1, 2, 3]
    assert scores[-1].agreement == 1
    assert 0 < scores[0].agreement < 1


def test_one_pass_gives_all_exits():
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"]).eval()
    calls = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, *_: calls.append(module))
    score_exits(model, torch.randint(0, 40, (6, 10)), batch_size=2)
    assert len(calls) == 3 * SHAPE["num_hidden_layers"]


def test_a_window_without_a_token_to_score_is_refused():
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"]).eval()
    with pytest.raises(ValueError, match="No token to score"):
        score_exits(model, torch.zeros(2, 5, dtype=torch.long), scored=torch.zeros(2, 5).bool())


@pytest.mark.parametrize("num_tokens", [2, 7, 8, 9, 16, 17, 31])
@pytest.mark.parametrize("stride", [1, 3, 7, 8])
def test_each_token_counts_once_with_all_the_context_there_is(num_tokens, stride):
    stream = list(range(100, 100 + num_tokens))
    windows, scored = cut_windows(stream, 8, stride)
    counted = windows[scored].tolist()
    assert counted == sorted(set(counted)), "a token counts twice, or out of order"
    lacking = set(stream) - set(counted)
    if stride < 8:
        assert lacking == {100}
    else:
        assert lacking == set(stream[::8]), "the first token of each window"
    for row, mask in zip(windows.tolist(), scored.tolist(), strict=True):
        for column in (i for i, counts in enumerate(mask) if counts):
            text = stream[max(0, row[column] - 100 - column) : row[column] - 100 + 1]
            assert row[: column + 1] == text
            assert column >= min(8 - stride, row[column] - 100)
    assert mask[-1] or row[-1] == 0, "only padding is left out at the end"


def test_with_a_token_at_each_windows_head_every_token_counts():
    stream = list(range(100, 120))
    windows, scored = cut_windows(stream, 8, 7, window_bos=5)
    assert windows[:, 0].tolist() == [5, 5, 5]
    assert windows[scored].tolist() == stream
    windows, scored = cut_windows(stream, 8, 3, window_bos=5)
    assert windows[scored].tolist() == stream


def test_documents_are_joined_with_the_tokenizers_own_ends(tmp_path):
    tokenizer = _save_tokenizer(tmp_path / "t")
    documents = [Document("1", "ab"), Document("2", "c")]
    a, b, c = tokenizer("abc")["input_ids"]
    assert encode(tokenizer, documents, "document", None).token_ids == [0, a, b, 1, 0, c, 1]
    assert encode(tokenizer, documents, "none", None).token_ids == [a, b, 1, c, 1]
    cut = encode(tokenizer, documents, "document", 3)
    assert (cut.token_ids, cut.num_documents) == ([0, a, b], 1)
    without = _save_tokenizer(tmp_path / "u", bos=None, eos=None)
    assert len(encode(without, documents, "none", None).token_ids) == 3
    one, other = (encode(tokenizer, d, "none", None).sha256 for d in (documents, documents[::-1]))
    assert one != other


def test_sources_are_files_folders_lines_and_the_held_out_modules(texts, tmp_path):
    documents = read_documents([str(texts)], "text")
    assert [d.text for d in documents] == ["abc def ghij\n" * 20, "jihg fed cba", "a b c d e f"]
    modules = read_documents(["stdlib"], "text")
    assert len(modules) > 10
    assert "heapq.py" in {document.name for document in modules}
    (tmp_path / "c.jsonl").write_text('{"content": "x\\u2028y"}\n')
    assert [d.text for d in read_documents([str(tmp_path / "c.jsonl")], "content")] == ["x\u2028y"]


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


def test_models_of_different_depth_share_a_table_and_overflow_is_no_nan(tmp_path):
    def model(label, perplexities):
        exits = [
            {"exit_layer": i, "perplexity": p, "accuracy": 0.5, "agreement": 1.0}
            for i, p in enumerate(perplexities, start=1)
        ]
        return {"label": label, "exits": exits}

    result = {
        "kind": evaluation_report.KIND,
        "models": [model("a", [math.inf, 218000.4]), model("b", [22.1349])],
    }
    evaluation_report.write_json(result, tmp_path / "r.json")
    rows = evaluation_report.rows(evaluation_report.read_json(tmp_path / "r.json"))
    assert [row[1:3] for row in rows] == [["inf", "22.13"], ["218000", "-"]]


def _config(folder, **changes):
    folder.mkdir(exist_ok=True)
    config = json.loads(LlamaConfig(**SHAPE, architectures=["LlamaForCausalLM"]).to_json_string())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


BAD = {
    "no folder": (["--model", "{tmp}/nowhere"], "nowhere: no config could be read"),
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
    "device": (["--device", "nodevice"], "--device nodevice: "),
    "plot format": (["--plot", "{tmp}/x.gif"], "must end with one of .pdf, .png, .svg"),
    "output folder": (["--json", "{tmp}/no/r.json"], "must be a file in a folder that exists"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_explained_in_a_line(case, checkpoints, texts, tmp_path, capsys):
    places = {"tmp": tmp_path, "two": checkpoints / "two"}
    for name in ("classifier", "t5", "bare", "other"):
        places[name] = tmp_path / name
    _config(places["classifier"], architectures=["LlamaForSequenceClassification"])
    places["t5"].mkdir()
    (places["t5"] / "config.json").write_text(
        '{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}'
    )
    _config(places["bare"])
    _config(places["other"])
    _save_tokenizer(places["other"], alphabet="jihgfedcba \n")
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

    folder = _save(FAMILIES["llama"], tmp_path / "m")
    _save_tokenizer(folder)
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
    folder = _save(configs[config], tmp_path / "m")
    _save_tokenizer(folder)
    stored = tmp_path / "r.json"
    assert _eval("--model", folder, "--data", texts, "--seq-len", 32, "--json", stored) == 0
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    stream = encode(tokenizer, read_documents([str(texts)], "text"), "document", None).token_ids
    windows, scored = cut_windows(stream, 32, 32)
    scores = json.loads(stored.read_text())["models"][0]["exits"]
    expected = _reference(model, windows, scored)
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
    folder = _save(config, tmp_path / "m")
    _save_tokenizer(folder)
    assert _eval("--model", folder, "--data", texts) == 2
    assert "GPTNeoXForCausalLM has no model.layers" in capsys.readouterr().err


def test_from_json_measures_nothing(tmp_path, capsys):
    (tmp_path / "other.json").write_text("{}")
    assert _eval("--from-json", tmp_path / "other.json") == 2
    assert "is no result" in capsys.readouterr().err
    assert _eval("--from-json", tmp_path / "other.json", "--data", "stdlib") == 2
    assert "--data and --from-json exclude each other" in capsys.readouterr().err
    with pytest.raises(UserError, match="--from-json"):
        evaluation_report.read_json(tmp_path / "none.json")


def test_the_stdlib_is_named_where_it_is_missing(monkeypatch):
    def missing():
        raise FileNotFoundError("No Python sources below /x.")

    monkeypatch.setattr(evaluation_data, "load_stdlib", missing)
    with pytest.raises(UserError, match="--data stdlib: No Python sources"):
        read_documents(["stdlib"], "text")


DOCS = Path(__file__).parents[3] / "docs"
MODEL = Path(vllm_layerskip.__file__).parent / "checkpoint"


def test_the_documented_table_is_the_stored_result():
    result = evaluation_report.read_json(DOCS / "data" / "eval-embedded.json")
    page = (DOCS / "evaluation.md").read_text()
    assert evaluation_report.markdown(result) in page
    assert evaluation_report.summary(result) in page


def test_the_stored_result_scores_the_checkpoint_that_ships():
    """The card scored the same text, its last, incomplete window aside."""
    result = evaluation_report.read_json(DOCS / "data" / "eval-embedded.json")
    card = json.loads((MODEL / "scores.json").read_text())["layerskip"]["exits"]
    (model,) = (model for model in result["models"] if model["label"] == "LayerSkip")
    for score, expected in zip(model["exits"], card, strict=True):
        assert score["accuracy"] == pytest.approx(expected["accuracy"], abs=2e-3)
        assert score["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-2)
