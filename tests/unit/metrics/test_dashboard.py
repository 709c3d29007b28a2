# SPDX-License-Identifier: Apache-2.0
"""Catch a dashboard that Grafana would not load, or that asks for series nobody exports."""

import itertools
import json
import re
from pathlib import Path

import prometheus_client
import pytest

from vllm_layerskip.metrics.prometheus import PREFIX

PATH = Path(__file__).parents[3] / "examples" / "grafana" / "vllm_layerskip.json"
DASHBOARD = json.loads(PATH.read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
TARGETS = [target for panel in PANELS for target in panel["targets"]]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
SERIES = re.compile(r"\b(?:vllm|vllm_layerskip):[a-zA-Z0-9_:]+")
SELECTOR = re.compile(r"(?P<name>(?:vllm|vllm_layerskip):[a-zA-Z0-9_:]+){(?P<labels>[^}]*)}")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Labels by series, as a server with LayerSkip exports them before its first request."""
    from transformers import LlamaConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.metrics.loggers import StatLoggerManager

    from vllm_layerskip.plugin import register

    register()
    folder = tmp_path_factory.mktemp("llama")
    LlamaConfig(
        architectures=["LlamaForCausalLM"], num_hidden_layers=4, max_position_embeddings=64
    ).save_pretrained(folder)
    request = {"method": "layerskip", "exit_layer": 2, "num_speculative_tokens": 3}
    args = EngineArgs(model=str(folder), skip_tokenizer_init=True, speculative_config=request)
    StatLoggerManager(args.create_engine_config())
    return {
        sample.name: set(sample.labels)
        for metric in prometheus_client.REGISTRY.collect()
        for sample in metric.samples
        if metric.name.startswith(("vllm:", PREFIX))
    }


def test_the_file_is_a_dashboard():
    assert DASHBOARD["schemaVersion"] >= 36
    assert DASHBOARD["title"]
    assert DASHBOARD["uid"]
    assert "id" not in DASHBOARD  # Grafana gives one on import.
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in PANELS:
        assert panel["title"]
        assert panel["targets"]
        assert {"defaults", "overrides"} <= panel["fieldConfig"].keys()
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)


def test_panels_fill_the_grid_without_overlap():
    cells = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for grid in [panel["gridPos"]]
        for x, y in itertools.product(
            range(grid["x"], grid["x"] + grid["w"]), range(grid["y"], grid["y"] + grid["h"])
        )
    ]
    assert len(set(cells)) == len(cells)
    assert {x for x, _ in cells} == set(range(24))


def test_every_query_goes_to_the_chosen_data_source():
    assert VARIABLES["datasource"]["type"] == "datasource"
    assert VARIABLES["datasource"]["query"] == "prometheus"
    for owner in (*PANELS, *TARGETS, VARIABLES["model_name"], VARIABLES["engine"]):
        assert owner["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target["expr"])
def test_a_query_names_series_and_labels_that_a_server_exports(exported, target):
    query = target["expr"]
    names = set(SERIES.findall(query))
    assert names
    assert names <= exported.keys()
    selectors = list(SELECTOR.finditer(query))
    assert {selector["name"] for selector in selectors} == names
    for selector in selectors:
        labels = set(re.findall(r"(\w+)=~?\"", selector["labels"]))
        assert labels == {"model_name", "engine"}
        assert labels <= exported[selector["name"]]
    for grouping in re.findall(r"by \(([^)]*)\)", query):
        for label in grouping.split(", "):
            assert all(label in exported[name] for name in names)
    assert set(re.findall(r"\$(\w+)", query)) <= {*VARIABLES, "__rate_interval"}
    # A counter alone only grows; a histogram's buckets are no latency.
    for name in names:
        if name.endswith(("_total", "_bucket")):
            assert re.search(rf"rate\({re.escape(name)}{{[^}}]*}}\[\$__rate_interval\]\)", query)
    assert ("histogram_quantile" in query) == any(name.endswith("_bucket") for name in names)
    assert query.count("(") == query.count(")")


def test_every_series_of_ours_has_a_panel(exported):
    shown = {name for target in TARGETS for name in SERIES.findall(target["expr"])}
    ours = {name for name in exported if name.startswith(PREFIX) and not name.endswith("_created")}
    assert len(ours) == 5
    assert ours <= shown


def test_variables_ask_for_labels_that_exist(exported):
    for name in ("model_name", "engine"):
        query = VARIABLES[name]["query"]["query"]
        assert query == VARIABLES[name]["definition"]
        (series,) = SERIES.findall(query)
        assert query.endswith(f", {name})")
        assert name in exported[series]
