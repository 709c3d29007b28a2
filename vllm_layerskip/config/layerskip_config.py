# SPDX-License-Identifier: Apache-2.0
"""The config object that carries LayerSkip through vLLM.

It is a ``SpeculativeConfig`` whose method is ``draft_model``. That method of vLLM has what
LayerSkip needs (K lookahead slots, async scheduling, an exact prefix cache with no dropped
block), and its draft config may be the target's own. The class here overrides what differs. vLLM
sends the object to its engine and worker processes unchanged.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm.config.speculative import SpeculativeConfig
from vllm.config.utils import config
from vllm.logger import init_logger
from vllm.transformers_utils.repo_utils import get_hf_file_bytes

from vllm_layerskip import __version__
from vllm_layerskip.config.admission import (
    check_engine,
    check_request,
    check_twin,
    settings_without_reuse,
)
from vllm_layerskip.config.draft_vocab import (
    REMEDY,
    DraftVocab,
    parse_draft_vocab,
    read_draft_vocab,
)
from vllm_layerskip.config.known_checkpoints import find_known_checkpoint
from vllm_layerskip.config.options import (
    CONFIG_BLOCK,
    LayerSkipOptions,
    OptionPath,
    resolve_options,
)
from vllm_layerskip.config.select_model import select_model
from vllm_layerskip.config.weight_files import check_weight_files
from vllm_layerskip.cpu.triton_interpreter import interpret_mode
from vllm_layerskip.host.environment import DRAFT_GRAPHS, flag
from vllm_layerskip.twins.adapter import AdapterWeights, DraftAdapter, read_draft_adapter
from vllm_layerskip.twins.kinds import GROUP_SIZES, NONE

logger = init_logger("vllm.layerskip.config")


@config
class LayerSkipConfig(SpeculativeConfig):
    """Self-speculative decoding with the first ``exit_layer`` layers of the target."""

    architecture: str = ""
    """Name of our model class in vLLM's registry; empty keeps the target's class."""
    exit_layer: int = 0
    """E: number of layers that draft, 1 <= E < L, or L with ``draft_quantization``."""
    reuse_exit_states: bool = True
    """Whether verification starts from the drafts' exit states where the batch allows."""
    draft_vocab: DraftVocab | None = None
    """The token ids that may be drafted; None for all."""
    draft_quantization: str = NONE
    """What the weights of the layers that draft are rounded to (``twins.kinds.CHOICES``)."""
    draft_adapter: DraftAdapter | None = None
    """The adapter that is merged into the layers that draft."""

    def __post_init__(self) -> None:
        # vLLM's own __post_init__ would load a second model config from `model`.
        self.method = "draft_model"
        self.model = self.target_model_config.model
        self.draft_model_config = self.target_model_config
        self.draft_parallel_config = self.target_parallel_config
        self.prompt_lookup_min = self.prompt_lookup_max = 0
        self._use_layerskip_model_class()

    def _use_layerskip_model_class(self) -> None:
        """Have this engine's target load our model class; other engines keep vLLM's."""
        if self.architecture:
            self.target_model_config.hf_config.architectures = [self.architecture]
            self.update_arch_()

    @property
    def max_num_new_slots_for_drafting(self) -> int:
        """Drafting starts at the sampled token's own position: no extra query slot."""
        return 0

    @property
    def has_twin(self) -> bool:
        """Whether drafts have weights of their own: a twin of the layers that draft."""
        return self.draft_quantization != NONE or self.draft_adapter is not None

    def compute_hash(self) -> str:
        """Hash vLLM's factors and those of ours that may change the compiled stages.

        ``reuse_exit_states`` and ``draft_vocab`` are left out. They change only what runs around
        the stages, so engines that differ only in them share what they compiled.
        """
        own: tuple[object, ...] = (self.exit_layer, self.num_speculative_tokens)
        if self.has_twin:
            digest = self.draft_adapter and self.draft_adapter.digest
            own += (self.draft_quantization, GROUP_SIZES, digest)
        return f"{super().compute_hash()}-layerskip-{__version__}-{own}"

    def __repr__(self) -> str:
        num_draft_ids = None if self.draft_vocab is None else len(self.draft_vocab)
        return (
            f"LayerSkipConfig(exit_layer={self.exit_layer}, "
            f"num_speculative_tokens={self.num_speculative_tokens}, "
            f"reuse_exit_states={self.reuse_exit_states}, "
            f"{self._twin_repr()}"
            f"draft_vocab={num_draft_ids and f'{num_draft_ids} token ids'})"
        )

    def _twin_repr(self) -> str:
        parts = []
        if self.draft_quantization != NONE:
            parts.append(f"draft_quantization={self.draft_quantization!r}, ")
        if self.draft_adapter is not None:
            parts.append(f"draft_adapter={str(self.draft_adapter.path)!r}, ")
        return "".join(parts)


def build_config(
    request: Mapping[str, Any],
    engine_args: Any,
    target_model_config: Any,
    target_parallel_config: Any,
) -> LayerSkipConfig:
    """Turn a user's ``speculative_config`` into a checked ``LayerSkipConfig``.

    Raises:
        ValueError: an option is wrong, or LayerSkip does not support the model or an
            engine setting; the message says what to change.
    """
    model = select_model(target_model_config)
    check_engine(engine_args, target_parallel_config)
    if engine_args.load_format != "dummy":
        check_weight_files(Path(target_model_config.model))
    _check_runner()
    flag(DRAFT_GRAPHS, default=True)  # Raises before weights are loaded.
    options = _resolve(request, target_model_config)
    check_request(options, bool(request.get("reuse_exit_states")), engine_args)
    check_twin(options, target_model_config, engine_args)
    without_reuse = settings_without_reuse(engine_args)
    if without_reuse:
        logger.info_once(
            "LayerSkip verifies with every layer, since %s is on.", " and ".join(without_reuse)
        )
    return LayerSkipConfig(
        target_model_config=target_model_config,
        target_parallel_config=target_parallel_config,
        architecture=model.architecture,
        exit_layer=options.exit_layer,
        num_speculative_tokens=options.num_speculative_tokens,
        reuse_exit_states=options.reuse_exit_states and not without_reuse,
        draft_vocab=_read_draft_vocab(options.draft_vocab, target_model_config),
        draft_quantization=options.draft_quantization,
        draft_adapter=_read_draft_adapter(options, target_model_config),
        **options.vllm_options,
    )


def _resolve(request: Mapping[str, Any], model_config: Any) -> LayerSkipOptions:
    """The request's options, with a published checkpoint's E and K where nothing else sets them."""
    num_layers = model_config.get_total_num_hidden_layers()
    block = getattr(model_config.hf_config, CONFIG_BLOCK, None)
    known = None if block is not None else find_known_checkpoint(model_config.model, num_layers)
    options = resolve_options(request, num_layers, block if known is None else known.block)
    if known is not None and options.from_checkpoint:
        logger.info_once(
            "%s has no 'layerskip' block in its config.json; using %s, known for %s (%s). "
            "`vllm-layerskip tune` finds the best values for this machine.",
            model_config.model,
            " and ".join(f"{key}={known.block[key]}" for key in options.from_checkpoint),
            known.name,
            known.source,
        )
    return options


def _read_draft_adapter(options: LayerSkipOptions, model_config: Any) -> DraftAdapter | None:
    named, folder = options.draft_adapter, Path(model_config.model)
    if named is None:
        return None
    path = Path(named.path).expanduser()
    if named.in_checkpoint:
        if not folder.is_dir():
            raise ValueError(
                f"{named.source}: the adapter lies in a checkpoint of the model hub. Download the "
                f"checkpoint ({model_config.model!r}) and serve its folder, or set "
                "draft_adapter='none' (--draft-adapter none)."
            )
        path = folder / named.path
    adapter = read_draft_adapter(
        path,
        named.source,
        hf_config=model_config.hf_config,
        base_name=model_config.model,
        base_folder=folder if folder.is_dir() else None,
        num_layers=model_config.get_total_num_hidden_layers(),
        exit_layer=options.exit_layer,
    )
    AdapterWeights(adapter).check_finite()
    made_for = adapter.base_model
    if made_for and Path(made_for).name != folder.name:
        logger.warning_once(
            "%s was made for %r, and the target is %r. Its shapes fit; if the models are not the "
            "same, few drafts are accepted.",
            named.source,
            made_for,
            model_config.model,
        )
    return adapter


def _read_draft_vocab(file: OptionPath | None, model_config: Any) -> DraftVocab | None:
    if file is None:
        return None
    vocab_size = model_config.get_vocab_size()
    if not file.in_checkpoint:
        return read_draft_vocab(Path(file.path).expanduser(), file.source, vocab_size)
    folder = Path(model_config.model)
    if folder.is_dir():
        return read_draft_vocab(folder / file.path, file.source, vocab_size)
    content = get_hf_file_bytes(file.path, model_config.model, model_config.revision)
    if content is None:
        raise ValueError(
            f"{file.source}: the checkpoint {model_config.model!r} has no such file. {REMEDY}"
        )
    return parse_draft_vocab(content, file.source, vocab_size)


def _check_runner() -> None:
    forced = os.environ.get("VLLM_USE_V2_MODEL_RUNNER")
    if forced is not None and forced.strip() in ("0", ""):
        raise ValueError(
            f"LayerSkip runs on vLLM's Model Runner V2, but VLLM_USE_V2_MODEL_RUNNER={forced!r} "
            "forces V1. Unset it, or set it to 1."
        )
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    if current_platform.is_cpu() and not (interpret_mode() and HAS_TRITON):
        raise ValueError(
            "On a CPU LayerSkip runs vLLM's Triton kernels in Triton's interpreter: set the "
            f"environment variable TRITON_INTERPRET=1 before Python starts (it is "
            f"{os.environ.get('TRITON_INTERPRET')!r}) and have Triton installed "
            "(pip install 'vllm-layerskip[cpu]')."
        )
