# SPDX-License-Identifier: Apache-2.0
"""Catch tables that do not show their result, and a page that shows another result."""

import json
import math
from pathlib import Path

import pytest

import vllm_layerskip
from vllm_layerskip.errors import UserError
from vllm_layerskip.evaluation import report

DOCS = Path(__file__).parents[3] / "docs"
MODEL = Path(vllm_layerskip.__file__).parent / "checkpoint"


def test_models_of_different_depth_share_a_table_and_overflow_is_no_nan(tmp_path):
    def model(label, perplexities):
        exits = [
            {"exit_layer": i, "perplexity": p, "accuracy": 0.5, "agreement": 1.0}
            for i, p in enumerate(perplexities, start=1)
        ]
        return {"label": label, "exits": exits}

    result = {
        "kind": report.KIND,
        "models": [model("a", [math.inf, 218000.4]), model("b", [22.1349])],
    }
    report.write_json(result, tmp_path / "r.json")
    rows = report.rows(report.read_json(tmp_path / "r.json"))
    assert [row[1:3] for row in rows] == [["inf", "22.13"], ["218000", "-"]]


def test_a_twin_is_named_and_what_its_agreement_is_with():
    exits = [{"exit_layer": 1, "perplexity": 2.0, "accuracy": 0.5, "agreement": 0.9}]
    twin = {"draft_quantization": "int4", "draft_adapter": "runs/heal", "adapter_digest": "0" * 16}
    data = {"num_scored_tokens": 9, "num_documents": 1, "sources": ["a"], "sha256": "0" * 64}
    settings = {"seq_len": 4, "stride": 4, "bos": "none", "dtype": "float32"}
    plain, other = {"label": "m", "exits": exits}, {"label": "m int4", "exits": exits}
    result = {
        "data": data,
        "settings": settings,
        "models": [plain, other | {"twin": twin | {"not_quantized": []}}],
    }
    text = report.summary(result)
    assert "'m int4' is a draft twin (draft_quantization int4, draft_adapter runs/heal)" in text
    assert "agreement is with the last layer of the model itself" in text
    assert "keep their width" not in text
    result["models"][1]["twin"]["not_quantized"] = ["model.layers.0.mlp.down_proj", "b"]
    assert "2 of its linear layers keep their width, model.layers.0.mlp" in report.summary(result)
    assert "twin" not in report.summary(result | {"models": [plain]})
    assert report.header(result)[-1] == "m int4 agreement"
    assert report.rows(result) == [["1", "2.000", "2.000", "50.0 %", "50.0 %", "90.0 %", "90.0 %"]]


def test_a_file_that_is_no_result_is_refused(tmp_path):
    with pytest.raises(UserError, match="--from-json"):
        report.read_json(tmp_path / "none.json")


def test_the_documented_table_is_the_stored_result():
    result = report.read_json(DOCS / "data" / "eval-embedded.json")
    page = (DOCS / "evaluation.md").read_text()
    assert report.markdown(result) in page
    assert report.summary(result) in page


def test_the_stored_result_scores_the_checkpoint_that_ships():
    """The card scored the same text, its last, incomplete window aside."""
    result = report.read_json(DOCS / "data" / "eval-embedded.json")
    card = json.loads((MODEL / "scores.json").read_text())["layerskip"]["exits"]
    (model,) = (model for model in result["models"] if model["label"] == "LayerSkip")
    for score, expected in zip(model["exits"], card, strict=True):
        assert score["accuracy"] == pytest.approx(expected["accuracy"], abs=2e-3)
        assert score["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-2)
