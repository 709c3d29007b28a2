# SPDX-License-Identifier: Apache-2.0
"""The first E layers of a checkpoint as a checkpoint of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path

from vllm_layerskip.errors import UserError

_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


def write_cut_checkpoint(source: Path, exit_layer: int, folder: Path) -> Path:
    """Copy config, tokenizer and all weights except those of layers E and up.

    Args:
        source: a checkpoint folder with safetensors weights.

    Raises:
        UserError: ``source`` has no safetensors weights.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    shards = sorted(source.glob("*.safetensors"))
    if not shards:
        raise UserError(f"{source} holds no *.safetensors. Convert the checkpoint to safetensors.")
    folder.mkdir(parents=True, exist_ok=True)
    shard_of: dict[str, str] = {}
    for shard in shards:
        with safe_open(shard, framework="pt") as weights:
            kept = {
                name: weights.get_tensor(name)
                for name in weights.keys()  # noqa: SIM118 (no mapping: keys() is all it has)
                if _is_kept(name, exit_layer)
            }
            if kept:
                save_file(kept, folder / shard.name, weights.metadata())
                shard_of |= dict.fromkeys(kept, shard.name)
    if len(shards) > 1:
        index = {"metadata": {}, "weight_map": shard_of}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = exit_layer
    config.pop("layerskip", None)
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:exit_layer]
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    for path in source.iterdir():
        if "token" in path.name or path.name == "generation_config.json":
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def _is_kept(name: str, exit_layer: int) -> bool:
    layer = _LAYER.match(name)
    return layer is None or int(layer[1]) < exit_layer
