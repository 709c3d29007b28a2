# SPDX-License-Identifier: Apache-2.0
"""Find out, before a model is loaded, whether vLLM has kernels for the twins that are asked for.

An engine would refuse them by itself, but only after minutes in which the target writes answers.
"""

from __future__ import annotations

from collections.abc import Iterable

from vllm_layerskip.errors import UserError
from vllm_layerskip.tuning.drafts import Draft
from vllm_layerskip.tuning.grid import PLAIN_DECODING
from vllm_layerskip.tuning.jobs import EngineSettings
from vllm_layerskip.tuning.measure import engine_arguments
from vllm_layerskip.twins.kinds import NONE


def check_kernels(engine: EngineSettings, drafts: Iterable[Draft]) -> None:
    """Check each kind on this machine; arguments that vLLM takes are presumed.

    Raises:
        UserError: vLLM has no kernel for a kind.
    """
    kinds = dict.fromkeys(draft.quantization for draft in drafts)
    kinds.pop(NONE, None)
    if not kinds:
        return
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs

    from vllm_layerskip.worker.twin_methods import kinds_that_work

    arguments = engine_arguments(engine, PLAIN_DECODING, 1)
    config = EngineArgs(**arguments).create_engine_config()
    dtype = config.model_config.dtype
    with set_current_vllm_config(config):
        working = kinds_that_work(dtype)
    lacking = [kind for kind in kinds if kind not in working]
    if lacking:
        raise UserError(
            f"--draft-quantization {lacking[0]}: vLLM has no kernel for it on this machine with "
            f"dtype {str(dtype).removeprefix('torch.')}. Kinds that work here: "
            f"{', '.join(working) or 'none'}. Leave the others out."
        )
