# SPDX-License-Identifier: Apache-2.0
"""torch functions in place of the Triton kernels that every step launches.

On a CPU Model Runner V2's Triton kernels run in Triton's interpreter: row by row and block
by block in Python, about a millisecond a row. Functions here
replace those of a plain or a LayerSkip step, through vLLM's own ``register_kernels``, so that
times on a CPU are the model's:

* ``batch``: a batch's positions, slots, token ids and counts;
* ``sampling``: work over the whole vocabulary for every sampled token;
* ``verification``: work over the whole vocabulary for every draft;
* ``randomness``: vLLM's and Triton's random bits, so that seeds keep their meaning.

Two of them do not run in the interpreter at all (``_topk_topp_kernel`` and, with
probabilistic drafts, ``_resample_kernel``). ``_gather_block_tables_kernel`` stays: only
the launch grid says how much it writes, and a replacement is not given the grid.

Only for a CPU in interpret mode; ``tests/unit/cpu/test_kernels.py`` compares each
function with the kernel that it replaces. A function takes the kernel's parameters that it uses,
by the kernel's own names; a tensor stands for a pointer.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable
from typing import Any

from vllm_layerskip.cpu.kernels import batch, sampling, verification
from vllm_layerskip.host import check, version

logger = logging.getLogger("vllm.layerskip.cpu_kernels")

KNOWN_KERNELS = (0, 32)
"""The (major, minor) of vLLM whose kernels these functions were compared with: a kernel may
keep its parameters and change its meaning."""

_GPU = "vllm.v1.worker.gpu"
_REJECTION = f"{_GPU}.spec_decode.rejection_sampler_utils"

REPLACEMENTS: dict[str, Callable[..., None]] = {
    f"{_GPU}.block_table:_compute_slot_mappings_kernel": batch.compute_slot_mappings,
    f"{_GPU}.input_batch:_prepare_pos_seq_lens_kernel": batch.prepare_pos_seq_lens,
    f"{_GPU}.input_batch:_combine_sampled_and_draft_tokens_kernel": (
        batch.combine_sampled_and_draft_tokens
    ),
    f"{_GPU}.input_batch:_expand_idx_mapping_kernel": batch.expand_idx_mapping,
    f"{_GPU}.input_batch:_get_num_sampled_and_rejected_kernel": batch.count_sampled_and_rejected,
    f"{_GPU}.input_batch:_post_update_kernel": batch.post_update,
    "vllm_layerskip.worker.draft_inputs:_prepare_first_pass_kernel": batch.prepare_first_drafts,
    "vllm_layerskip.worker.draft_inputs:_advance_kernel": batch.advance_drafts,
    "vllm_layerskip.worker.model_state:_prepare_plan_kernel": batch.prepare_verify_plan,
    "vllm_layerskip.worker.exit_states:_store_kernel": batch.store_exit_states,
    "vllm_layerskip.worker.exit_states:_gather_kernel": batch.gather_exit_states,
    f"{_GPU}.sample.gumbel:_temperature_kernel": sampling.apply_temperature,
    f"{_GPU}.sample.gumbel:_gumbel_sample_kernel": sampling.gumbel_sample,
    "vllm.v1.sample.ops.topk_topp_triton:_topk_topp_kernel": sampling.top_k_top_p,
    f"{_GPU}.spec_decode.rejection_sampler:_gather_draft_sampled_kernel": (
        verification.gather_draft_sampled
    ),
    f"{_REJECTION}:_compute_local_logits_stats_kernel": verification.logits_stats,
    f"{_REJECTION}:_rejection_kernel": verification.reject,
    f"{_REJECTION}:_resample_kernel": verification.resample,
    f"{_REJECTION}:_insert_resampled_kernel": verification.insert_resampled,
}
"""The replaced kernels, as ``module:kernel``, and what replaces them."""


def register() -> None:
    """Have vLLM launch these functions instead of the kernels, in this process.

    Kernels of another vLLM than 0.32, and kernels that lack a parameter, are left alone.
    """
    from vllm.triton_utils import dispatcher

    known = version.release_of(version.vllm_version()) in (None, KNOWN_KERNELS)
    launches = {}
    for path, function in REPLACEMENTS.items():
        name = path.replace(":", ".")
        if name in dispatcher._registry or not (known or name.startswith("vllm_layerskip.")):
            continue
        try:
            launches[name] = launcher(check.resolve(path).arg_names, function)
        except (AttributeError, ImportError, TypeError) as error:
            logger.debug("%s stays in Triton's interpreter: %s", path, error)
    if launches:
        with warnings.catch_warnings():
            # register_kernels looks at every attribute of every module, deprecated ones too.
            warnings.simplefilter("ignore", FutureWarning)
            dispatcher.register_kernels(launches)


def launcher(arg_names: tuple[str, ...], function: Callable[..., None]) -> Callable[..., None]:
    """``function`` with a kernel's own parameters, by position or by name.

    Raises:
        TypeError: the kernel lacks a parameter of ``function``.
    """
    used = tuple(inspect.signature(function).parameters)
    if not set(used) <= set(arg_names):
        raise TypeError(f"{function.__name__} needs {set(used) - set(arg_names)} of {arg_names}")

    def launch(*args: Any, **kwargs: Any) -> None:
        # kwargs may hold launch options (num_warps), too.
        given = dict(zip(arg_names, args, strict=False)) | kwargs
        function(**{name: given[name] for name in used})

    # vLLM forwards a launch by name only to a function whose parameters are the kernel's own.
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in arg_names]
    launch.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return launch
