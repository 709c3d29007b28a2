# SPDX-License-Identifier: Apache-2.0
"""Score every exit of one or two checkpoints on the same text."""

from __future__ import annotations

import functools
import platform
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from tqdm import tqdm

from vllm_layerskip import __version__
from vllm_layerskip.errors import UserError, first_line
from vllm_layerskip.evaluation.checkpoints import check_exit_head, load_config, load_model
from vllm_layerskip.evaluation.data import (
    EncodedText,
    Windows,
    cut_windows,
    encode,
    read_documents,
)
from vllm_layerskip.evaluation.report import KIND, Result
from vllm_layerskip.evaluation.scores import ExitScore, Target, score_exits
from vllm_layerskip.evaluation.settings import (
    DEFAULT_SEQ_LEN,
    BeginOfSequence,
    Checkpoint,
    EvalSettings,
    TwinSettings,
)
from vllm_layerskip.evaluation.twin import check_twin, make_twin
from vllm_layerskip.files.tokenizers import load_tokenizer
from vllm_layerskip.twins.adapter import DraftAdapter

_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
"""Largest relative difference between the last exit's logits and the model's."""


def evaluate(settings: EvalSettings) -> Result:
    """Score the exits of the settings' checkpoints.

    Raises:
        UserError: a checkpoint, the data or a setting is not usable; the message says why.
    """
    device = _device(settings.device)
    checkpoints, text = settings.checkpoints, settings.text
    configs = [load_config(c.name, c.option, settings.trust_remote_code) for c in checkpoints]
    twin = settings.twin
    adapter = None if twin is None else check_twin(twin, checkpoints[0], configs[0])
    seq_len = _seq_len(text.seq_len, checkpoints, configs)
    encoded, bos_id = _encode(settings, configs)
    window_bos = bos_id if text.bos == "window" else None
    stride = _stride(text.stride, seq_len - (window_bos is not None))
    windows = cut_windows(encoded.token_ids, seq_len, stride, window_bos)
    return {
        "kind": KIND,
        "argv": list(settings.argv),
        "versions": _versions(),
        "settings": {
            "seq_len": seq_len,
            "stride": stride,
            "bos": text.bos if bos_id is not None else "none",
            "dtype": settings.dtype,
            "device": device,
            "batch_size": settings.batch_size,
        },
        "data": _describe(text.sources, encoded, windows),
        "models": [
            model
            for checkpoint in checkpoints
            for model in _score(settings, checkpoint, device, windows, adapter)
        ],
    }


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (AssertionError, RuntimeError) as error:
        raise UserError(f"--device {name}: {first_line(error)}.") from None
    return name


def _seq_len(asked: int | None, checkpoints: Sequence[Checkpoint], configs: Sequence[Any]) -> int:
    limits = {
        checkpoint.name: limit
        for checkpoint, config in zip(checkpoints, configs, strict=True)
        if (limit := getattr(config, "max_position_embeddings", None)) is not None
    }
    seq_len = asked or min([DEFAULT_SEQ_LEN, *limits.values()])
    for name, limit in limits.items():
        if seq_len > limit:
            raise UserError(
                f"--seq-len {seq_len} must be at most {limit}, the max_position_embeddings of "
                f"{name}."
            )
    return seq_len


def _stride(asked: int | None, longest: int) -> int:
    """The stride, from 1 to ``longest``, the tokens of text in a window."""
    stride = longest if asked is None else asked
    if not 1 <= stride <= longest:
        raise UserError(
            f"--stride {stride} must be from 1 to {longest}, the tokens of text in a window."
        )
    return stride


def _encode(settings: EvalSettings, configs: Sequence[Any]) -> tuple[EncodedText, int | None]:
    """The text as token ids, which must be the same for all models; and the id that begins it."""
    text, checkpoints = settings.text, settings.checkpoints
    documents = read_documents(text.sources, text.text_field)
    found: list[tuple[EncodedText, int | None]] = []
    for checkpoint, config in zip(checkpoints, configs, strict=True):
        tokenizer = load_tokenizer(
            checkpoint.name, checkpoint.option, trust_remote_code=settings.trust_remote_code
        )
        bos: BeginOfSequence = text.bos if tokenizer.bos_token_id is not None else "none"
        encoded = encode(tokenizer, documents, bos, text.max_tokens)
        _check_ids(encoded, config.vocab_size, checkpoint, text.sources)
        found.append((encoded, tokenizer.bos_token_id))
    for checkpoint, other in zip(checkpoints[1:], found[1:], strict=True):
        _check_same(checkpoints[0], found[0], checkpoint, other)
    return found[0]


def _check_ids(
    encoded: EncodedText, vocab_size: int, checkpoint: Checkpoint, sources: Sequence[str]
) -> None:
    if len(encoded.token_ids) < 2:
        raise UserError(f"--data {' '.join(sources)}: there are fewer than two tokens in it.")
    if (largest := max(encoded.token_ids)) >= vocab_size:
        raise UserError(
            f"{checkpoint.option} {checkpoint.name}: its tokenizer yields token id {largest}, but "
            f"its config.json has vocab_size={vocab_size}. Give a checkpoint with its own "
            "tokenizer."
        )


def _check_same(
    checkpoint: Checkpoint,
    text: tuple[EncodedText, int | None],
    other: Checkpoint,
    other_text: tuple[EncodedText, int | None],
) -> None:
    (one, bos_id), (two, other_bos_id) = text, other_text
    if one.token_ids != two.token_ids or bos_id != other_bos_id:
        raise UserError(
            f"{other.option} {other.name}: its tokenizer is not that of {checkpoint.name} "
            f"({len(two.token_ids)} and {len(one.token_ids)} tokens for the same text), so scores "
            "per token cannot be compared. Compare checkpoints with one tokenizer."
        )


def _describe(sources: Sequence[str], encoded: EncodedText, windows: Windows) -> dict[str, Any]:
    return {
        "sources": list(sources),
        "num_documents": encoded.num_documents,
        "num_bytes": encoded.num_bytes,
        "sha256": encoded.sha256,
        "num_tokens": len(encoded.token_ids),
        "num_windows": len(windows.token_ids),
        "num_scored_tokens": windows.num_scored_tokens,
    }


def _score(
    settings: EvalSettings,
    checkpoint: Checkpoint,
    device: str,
    windows: Windows,
    adapter: DraftAdapter | None,
) -> list[dict[str, Any]]:
    """Load one model, score its exits and its twin's, and let go of it."""
    option, name, label = checkpoint
    model = load_model(name, option, settings.dtype, device, settings.trust_remote_code)
    tolerance = _TOLERANCE[settings.dtype]
    check_exit_head(model, windows.token_ids[:1, :64], tolerance, name, option)
    facts = {
        "model": name,
        "architecture": type(model).__name__,
        "num_layers": model.config.num_hidden_layers,
        "num_parameters": model.num_parameters(),
    }
    twin = settings.twin
    num_windows = len(windows.token_ids) * (1 if twin is None else 2)
    with tqdm(total=num_windows, unit="window", desc=f"Scoring {name}") as progress:
        score = functools.partial(
            score_exits,
            model,
            windows.token_ids,
            settings.batch_size,
            scored=windows.scored,
            progress=progress.update,
        )
        if twin is None:
            return [{"label": label, **facts, "exits": _exits(score())}]
        target = Target()
        scores = score(target=target)
        made = _make_twin(model, twin, adapter)
        twin_scores = score(target=target)
    return [
        {"label": label, **facts, "exits": _exits(scores)},
        {"label": settings.twin_label, **facts, "twin": made, "exits": _exits(twin_scores)},
    ]


def _make_twin(model: Any, twin: TwinSettings, adapter: DraftAdapter | None) -> dict[str, Any]:
    """Turn ``model`` into its twin; returns what the result says of it."""
    try:
        whole = make_twin(model, twin.draft_quantization, adapter)
    except ValueError as error:
        raise UserError(str(error)) from None
    return {
        "draft_quantization": twin.draft_quantization,
        "draft_adapter": twin.draft_adapter,
        "adapter_digest": None if adapter is None else adapter.digest,
        "not_quantized": whole,
    }


def _exits(scores: Sequence[ExitScore]) -> list[dict[str, float]]:
    return [score.to_dict() for score in scores]


def _versions() -> dict[str, str]:
    return {
        "vllm_layerskip": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
