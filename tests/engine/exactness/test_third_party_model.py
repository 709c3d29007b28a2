# SPDX-License-Identifier: Apache-2.0
"""The recipe of docs/adding-an-architecture.md, written out as it stands there and run.

Catches a registration that does not reach vLLM's engine process, and a recipe that rots.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
from checkpoints import with_config
from engines import ENGINE_DEFAULTS
from families import random_checkpoint
from processes import HERE, python_path, run_script

RECIPE = Path(__file__).parents[3] / "docs" / "adding-an-architecture.md"
PROMPTS = [[0, *range(3, 3 + length)] for length in (4, 21, 40)]
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder of installed packages with the recipe's, as pip would leave it."""
    site = tmp_path_factory.mktemp("site")
    blocks = re.findall(r"```(?:python|toml)\n# (\S+)\n(.*?)```", RECIPE.read_text(), re.DOTALL)
    files = dict(blocks)
    assert sorted(files) == ["pyproject.toml", "scaled_llama/__init__.py", "scaled_llama/models.py"]
    (site / "scaled_llama").mkdir()
    for name in ("__init__.py", "models.py"):
        (site / "scaled_llama" / name).write_text(files[f"scaled_llama/{name}"])
    project = tomllib.loads(files["pyproject.toml"])["project"]
    info = site / "scaled_llama-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    (group,) = project["entry-points"].items()
    (info / "entry_points.txt").write_text(
        f"[{group[0]}]\n" + "".join(f"{name} = {value}\n" for name, value in group[1].items())
    )
    return site


def generate(site: Path, model: Path, speculative_config: dict | None) -> dict:
    """Tokens of an engine that runs in a process of its own, as `vllm serve` has it."""
    request = {
        "engine": {
            **ENGINE_DEFAULTS,
            "model": str(model),
            "skip_tokenizer_init": True,
            "speculative_config": speculative_config,
        },
        "prompts": PROMPTS,
        "max_tokens": MAX_TOKENS,
    }
    (result,), _ = run_script(
        "generate_in_process.py", json.dumps(request), environment=python_path(HERE, site)
    )
    return result


def test_the_recipe(pool, site, tmp_path, monkeypatch):
    llama = random_checkpoint(tmp_path / "llama", "LlamaForCausalLM")
    model = with_config(llama, tmp_path / "scaled", architectures=["ScaledLlamaForCausalLM"])
    result = generate(
        site, model, {"method": "layerskip", "exit_layer": 2, "num_speculative_tokens": 3}
    )
    # The model without LayerSkip, registered by the recipe's own function.
    monkeypatch.syspath_prepend(site)
    import scaled_llama

    scaled_llama.register()
    expected = pool.get(model).greedy(PROMPTS, MAX_TOKENS)
    assert result["tokens"] == expected
    assert expected != pool.get(llama).greedy(PROMPTS, MAX_TOKENS), "its own part does nothing"
    metrics = result["metrics"]
    accepted = metrics["vllm:spec_decode_num_accepted_tokens"]
    assert 0 < accepted < metrics["vllm:spec_decode_num_draft_tokens"]
    assert result["stats"][0]["num_verify_steps_reused"] > 0
