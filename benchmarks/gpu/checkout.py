# SPDX-License-Identifier: Apache-2.0
"""Lets Python find a checkout's entry points without building or installing it.

vLLM finds a plugin by its entry points, which belong to an installed distribution. On a machine
without a network ``pip install`` may lack its build backend; the folder made here needs none.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import vllm_layerskip


def entry_points_folder(root: Path, folder: Path) -> Path:
    """Write the metadata of the checkout at ``root`` into ``folder``; both belong on sys.path."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    version = vllm_layerskip.__version__
    metadata = folder / f"{project['name'].replace('-', '_')}-{version}.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {version}\n", encoding="utf-8"
    )
    groups = {"console_scripts": project["scripts"], **project["entry-points"]}
    lines = []
    for group, entries in groups.items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in entries.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
