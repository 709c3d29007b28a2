# SPDX-License-Identifier: Apache-2.0
"""E and K of the published LayerSkip checkpoints, whose config.json has no ``layerskip`` block.

Meta publishes no table with a pair for each checkpoint. The pairs here are from the method's own
paper and README, and from transformers' examples, as far as these state them. A source that drafts
until confidence falls (``dynamic``) names no K. Its checkpoints get ``DYNAMIC_K``, the only fixed K
that is published for an exit at a quarter of a small model (the reference's own test of Llama 3.2
1B). The pairs are a start: ``vllm-layerskip tune`` finds the pair for a machine and a load.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ORGANISATION = "facebook"
DYNAMIC_K = 4

_BLOG = "Hugging Face's blog on LayerSkip"
_DRAFT = f"a draft of {_BLOG}"
_TEST = f"K = {DYNAMIC_K}: its own K is dynamic; the reference's test of Llama 3.2 1B uses this K"


@dataclass(frozen=True)
class KnownCheckpoint:
    """A published checkpoint.

    ``num_layers`` is its L; a model of this name with another L is another model.
    """

    name: str
    num_layers: int
    exit_layer: int
    num_speculative_tokens: int
    source: str
    """Where E and K are from, in words for the log."""

    @property
    def block(self) -> dict[str, int]:
        """What its config.json's ``layerskip`` block would say."""
        return {
            "exit_layer": self.exit_layer,
            "num_speculative_tokens": self.num_speculative_tokens,
        }


KNOWN_CHECKPOINTS: tuple[KnownCheckpoint, ...] = (
    KnownCheckpoint(
        "layerskip-llama2-7B",
        32,
        8,
        6,
        "README of facebookresearch/LayerSkip; arXiv 2404.16710v4, table 3, HumanEval",
    ),
    KnownCheckpoint(
        # Table 3 also has E = 15 with K = 12 (CNN/DM) or 4 (XSUM).
        "layerskip-llama2-13B",
        40,
        7,
        4,
        "arXiv 2404.16710v4, table 3, HumanEval",
    ),
    KnownCheckpoint("layerskip-llama2-70B", 80, 10, DYNAMIC_K, f"E = 10: {_BLOG}; {_TEST}"),
    KnownCheckpoint("layerskip-codellama-7B", 32, 4, DYNAMIC_K, f"E = 4: {_DRAFT}; {_TEST}"),
    KnownCheckpoint("layerskip-codellama-34B", 48, 8, DYNAMIC_K, f"E = 8: {_DRAFT}; {_TEST}"),
    KnownCheckpoint("layerskip-llama3-8B", 32, 4, DYNAMIC_K, f"E = 4: {_BLOG}; {_TEST}"),
    KnownCheckpoint(
        "layerskip-llama3.2-1B",
        16,
        4,
        4,
        f"E = 4: {_BLOG} and transformers' documentation; E and K: tests of "
        "facebookresearch/LayerSkip",
    ),
)  # fmt: skip


def find_known_checkpoint(model: str, num_layers: int) -> KnownCheckpoint | None:
    """The published checkpoint that ``model`` names, or None.

    Args:
        model: a name on the model hub, which has to be Meta's; a folder of the checkpoint's name;
            or a folder in the model hub's cache.
        num_layers: L of the model.
    """
    known = _BY_NAME.get(_checkpoint_name(model) or "")
    return known if known is not None and known.num_layers == num_layers else None


_BY_NAME = {known.name.lower(): known for known in KNOWN_CHECKPOINTS}


def _checkpoint_name(model: str) -> str | None:
    path = Path(model)
    if not path.is_dir():
        organisation, _, name = model.lower().partition("/")
        return name if organisation == ORGANISATION else None
    prefix = f"models--{ORGANISATION}--"
    for part in (part.lower() for part in path.parts):
        if part.startswith(prefix):
            return part.removeprefix(prefix)
    return path.name.lower()
