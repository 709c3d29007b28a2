# SPDX-License-Identifier: Apache-2.0
"""Documents as training samples of token ids and labels."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from datasets import Dataset, Features, List, Value  # type: ignore[import-untyped]
from datasets.exceptions import DatasetGenerationError  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerBase

from vllm_layerskip.errors import UserError
from vllm_layerskip.training.config import DataConfig, Source
from vllm_layerskip.training.encoder import Encoded, Encoder
from vllm_layerskip.training.loss import IGNORED
from vllm_layerskip.training.records import open_records

_VERSION = 2
"""Part of the cache's key: raise it when samples change for the same input."""
_FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})


def load_samples(
    source: Source, data: DataConfig, tokenizer: PreTrainedTokenizerBase, key: str
) -> Dataset:
    """Training samples ``{"input_ids", "labels"}``; the same input is encoded once.

    Args:
        key: of ``source`` in the YAML.

    Raises:
        UserError: the data cannot be read, or hold too little.
    """
    records = open_records(source, data, key)
    encoder = Encoder(tokenizer, data)

    def samples() -> Iterator[dict[str, np.ndarray]]:
        documents = (encoder.encode(record, where) for where, record in records.read())
        cut = pack(documents, data.seq_len) if data.packing else truncate(documents, data.seq_len)
        sample = None
        for sample in itertools.islice(cut, source.max_samples):
            # Arrow takes arrays much faster than lists.
            yield {name: np.array(ids, np.int32) for name, ids in sample._asdict().items()}
        if sample is None:
            raise _too_little(data, key)

    settings = repr(replace(data, train=source, eval=None))
    parts = (str(_VERSION), records.fingerprint, settings, tokenizer_fingerprint(tokenizer))
    fingerprint = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    try:
        return Dataset.from_generator(samples, features=_FEATURES, fingerprint=fingerprint)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def _too_little(data: DataConfig, key: str) -> UserError:
    if data.packing:
        return UserError(
            f"{key}: it holds less than data.seq_len={data.seq_len} tokens with something to train "
            "on. Give more text, or lower data.seq_len."
        )
    return UserError(f"{key}: it holds no document with something to train on. Give more text.")


def pack(documents: Iterable[Encoded], seq_len: int) -> Iterator[Encoded]:
    """Blocks of exactly ``seq_len`` tokens out of one stream; the ragged end is dropped.

    A block that begins within a response goes on with it. Blocks without any label are left out.
    """
    ids: list[int] = []
    labels: list[int] = []
    for document in documents:
        ids += document.input_ids
        labels += document.labels
        whole = len(ids) - len(ids) % seq_len
        for start in range(0, whole, seq_len):
            block = Encoded(ids[start : start + seq_len], labels[start : start + seq_len])
            if _has_target(block):
                yield block
        del ids[:whole], labels[:whole]


def truncate(documents: Iterable[Encoded], seq_len: int) -> Iterator[Encoded]:
    """One sample a document, of at most ``seq_len`` tokens; those without a label are left out."""
    for document in documents:
        sample = Encoded(document.input_ids[:seq_len], document.labels[:seq_len])
        if _has_target(sample):
            yield sample


def _has_target(sample: Encoded) -> bool:
    return any(label != IGNORED for label in sample.labels[1:])  # Nothing predicts the first.


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of what a tokenizer does, whatever folder it is in."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = (
        backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    )
    # A template prints special tokens by their names.
    named = sorted(tokenizer.special_tokens_map.items(), key=str)
    parts = (content, str(tokenizer.eos_token_id), repr(named), str(tokenizer.chat_template))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Collator:
    """Samples as tensors ``[B, T]``, padded to the longest if they differ in length."""

    pad_token_id: int

    def __call__(self, samples: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
        lengths = [len(sample["input_ids"]) for sample in samples]
        longest = max(lengths)
        batch = {
            name: torch.tensor(
                [[*sample[name]] + [fill] * (longest - len(sample[name])) for sample in samples]
            )
            for name, fill in (("input_ids", self.pad_token_id), ("labels", IGNORED))
        }
        if min(lengths) < longest:
            # Only where needed: without a mask attention takes the fast, causal path.
            positions = torch.arange(longest)
            batch["attention_mask"] = (positions < torch.tensor(lengths)[:, None]).long()
        return batch
