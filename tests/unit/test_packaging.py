# SPDX-License-Identifier: Apache-2.0
"""Catch a wheel that lacks a file, and an installed package that needs its checkout."""

from __future__ import annotations

import email
import json
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

import vllm_layerskip

ROOT = Path(__file__).parents[2]
_LOOK = """
import json, vllm_layerskip
from importlib.metadata import entry_points
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(vllm_layerskip.embedded_checkpoint())
(plugin,) = entry_points(group="vllm.general_plugins", name="layerskip")
print(json.dumps({"package": vllm_layerskip.__file__, "plugin": plugin.load().__module__,
                  "layers": model.config.num_hidden_layers}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from the files that are under version control, as from a clean clone."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True,
    ).stdout.decode()  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--no-index", "--wheel-dir", str(output), str(source)]
    subprocess.run(command, check=True)
    (wheel,) = output.glob("*.whl")
    return wheel


def test_the_wheel_has_what_it_needs(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    package = {
        f"vllm_layerskip/{path.relative_to(ROOT / 'vllm_layerskip').as_posix()}"
        for path in (ROOT / "vllm_layerskip").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert package <= names
    assert "vllm_layerskip/py.typed" in names
    assert {"vllm_layerskip", info} == {name.split("/")[0] for name in names}
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE"} <= names
    assert metadata["Version"] == vllm_layerskip.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {"cpu", "gpu", "train", "ray", "bench"} <= set(metadata.get_all("Provides-Extra"))
    for entry in (
        "layerskip = vllm_layerskip.plugin:register",
        "vllm_layerskip.commands.main:main",
    ):
        assert entry in entry_points


def test_the_version_stands_in_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dynamic"] == ["version"]
    assert "version" not in project
    changelog = (ROOT / "CHANGELOG.md").read_text()
    headings = [line for line in changelog.splitlines() if line.startswith("## ")]
    assert headings[0].startswith(f"## {vllm_layerskip.__version__}")
    # Each release says for which vLLM it is.
    for section in changelog.split("\n## ")[1:]:
        assert "\nvLLM: " in section, section.splitlines()[0]


def test_it_works_from_an_installed_wheel(wheel, tmp_path):
    """In a fresh environment, which sees this one's vLLM but not this checkout."""
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True
    )
    python = tmp_path / "venv" / "bin" / "python"
    [site] = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*install, "--no-deps", "--no-index", str(wheel)], check=True)
    # After the install, so that pip does not take the checkout's for it. No .pth file of this
    # environment is read from there, so an editable install stays out.
    (site / "zz_host.pth").write_text(sysconfig.get_path("purelib") + "\n")
    output = subprocess.run(
        [str(python), "-c", _LOOK], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    found = json.loads(output.splitlines()[-1])
    assert found["package"].startswith(str(site))
    assert found["layers"] == 12
    assert found["plugin"] == "vllm_layerskip.plugin"
    command = tmp_path / "venv" / "bin" / "vllm-layerskip"
    version = subprocess.run(
        [str(command), "--version"], capture_output=True, text=True, check=True
    )
    assert version.stdout.startswith(f"vllm-layerskip {vllm_layerskip.__version__} (vLLM 0.")
