# SPDX-License-Identifier: Apache-2.0
"""A wheel like the real one, whose GGUF file is a Llama of two layers, and a pip that has it."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from vllm_layerskip.example_model import pinned
from vllm_layerskip.example_model.pinned import Wheel

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>\n{% endfor %}"
LAYERS, HIDDEN, MIDDLE, HEADS, KV_HEADS = 2, 64, 96, 4, 2
SHAPE = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": LAYERS, "hidden_size": HIDDEN}


def tokens() -> list[str]:
    """The special ones, one for each byte, and the merges."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return [*SPECIAL, *bytes_to_unicode().values(), *(a + b for a, b in merges())]


def merges() -> list[tuple[str, str]]:
    return [("Ġ", "Ġ"), ("h", "e"), ("1", "2")]


def tensors() -> dict[str, np.ndarray]:
    """Float32, by the names of GGUF."""
    random = np.random.default_rng(0)
    kv = HIDDEN // HEADS * KV_HEADS
    layer = {
        "attn_q": (HIDDEN, HIDDEN), "attn_k": (kv, HIDDEN), "attn_v": (kv, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN), "ffn_gate": (MIDDLE, HIDDEN), "ffn_up": (MIDDLE, HIDDEN),
        "ffn_down": (HIDDEN, MIDDLE), "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (len(tokens()), HIDDEN),
        "output_norm": (HIDDEN,),
    }
    for index in range(LAYERS):
        shapes |= {f"blk.{index}.{name}": shape for name, shape in layer.items()}
    return {
        f"{name}.weight": random.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def write_gguf(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MIDDLE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens()))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens())
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens()) - len(SPECIAL)))
    writer.add_token_merges([" ".join(pair) for pair in merges()])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    q4 = gguf.GGMLQuantizationType.Q4_1
    for name, values in tensors().items():
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quantize(values, q4), raw_dtype=q4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_wheel(folder: Path) -> tuple[Wheel, Path]:
    """The wheel and what it is, as ``pinned`` describes the real one."""
    folder.mkdir(parents=True, exist_ok=True)
    write_gguf(folder / "tiny.gguf")
    file = folder / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.write(folder / "tiny.gguf", "tiny/tiny.gguf")
        archive.writestr("tiny-1.0.dist-info/LICENSE", "Apache-2.0")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    wheel = Wheel("tiny", "1.0", digest, 1, "tiny/tiny.gguf", "tiny-1.0.dist-info/LICENSE", None)
    return wheel, file


class FakePip:
    """Stands for ``subprocess.run`` of ``fetch``: puts a wheel where pip would."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.calls: list[list[str]] = []
        self.before: Callable[[], object] = lambda: None
        """What happens while pip runs."""
        self.fails: tuple[int, str] | None = None
        """Its status and stderr."""

    def __call__(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        self.calls.append(command)
        self.before()
        if self.fails is not None:
            return subprocess.CompletedProcess(command, self.fails[0], None, self.fails[1])
        shutil.copy(self.file, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, None, "")


def write_original(folder: Path, **changes: Any) -> Path:
    """A checkpoint of the real model's shape, whose weights are zeros.

    Args:
        changes: of config.json.
    """
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir()
    config = {**pinned.SHAPE, "model_type": "llama", "head_dim": 64, "dtype": "bfloat16", **changes}
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        shapes = LlamaForCausalLM(LlamaConfig(**config)).state_dict()
    zeros = {
        name: torch.zeros(tensor.shape, dtype=torch.bfloat16)
        for name, tensor in shapes.items()
        if name != "lm_head.weight"
    }
    save_file(zeros, folder / "model.safetensors", metadata={"format": "pt"})
    names = [*SPECIAL, *(f"token{number}" for number in range(config["vocab_size"] - 3))]
    vocab = {name: number for number, name in enumerate(names)}
    Tokenizer(BPE(vocab=vocab, merges=[])).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder
