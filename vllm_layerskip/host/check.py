# SPDX-License-Identifier: Apache-2.0
"""Compares the installed vLLM with what this plugin touches (``contacts.py``)."""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from typing import Any

from vllm_layerskip.architectures import VllmModel
from vllm_layerskip.host import version
from vllm_layerskip.host.contacts import CONTACTS, HostContact, model_contacts
from vllm_layerskip.host.environment import ALLOW_UNTESTED

logger = logging.getLogger("vllm.layerskip.host")


def resolve(path: str) -> Any:
    """The object that a contact names.

    Raises:
        ImportError, AttributeError: it does not exist in the installed vLLM.
    """
    module_name, _, attributes = path.partition(":")
    found: Any = importlib.import_module(module_name)
    for attribute in attributes.split("."):
        found = inspect.getattr_static(found, attribute)
        if isinstance(found, staticmethod | classmethod):
            found = found.__func__
    return found


def contact_problem(contact: HostContact) -> str | None:
    """What is wrong with one contact, or None."""
    try:
        found = resolve(contact.path)
    except (ImportError, AttributeError) as error:
        return f"{contact.path} is missing ({error})"
    if not contact.parameters:
        return None
    names = [name for name in inspect.signature(found).parameters if name != "cls"]
    return parameters_problem(contact, names)


def parameters_problem(contact: HostContact, names: list[str]) -> str | None:
    """What is wrong with a contact that takes parameters of these names, or None."""
    wanted = [name for name in names if name in contact.parameters]
    if wanted != list(contact.parameters):
        return f"{contact.path} takes ({', '.join(names)}), expected {contact.parameters}"
    return None


@functools.cache
def check_contacts() -> tuple[str, ...]:
    """Everything in ``CONTACTS`` that the installed vLLM does not satisfy."""
    problems = (contact_problem(contact) for contact in CONTACTS)
    return tuple(problem for problem in problems if problem is not None)


def require_model(architecture: str, model: VllmModel) -> None:
    """Raises RuntimeError unless vLLM runs ``architecture`` with the class that ours fits."""
    registered = registered_class(architecture)
    if registered != model.causal_lm:
        raise RuntimeError(
            f"LayerSkip runs {architecture} with a class derived from {model.causal_lm}, but "
            f"vLLM's registry has {registered} under that name, registered by another plugin or "
            "by model_class_overrides. Derive an early-exit class from that one and register it "
            "(docs/adding-an-architecture.md), or leave speculative_config out."
        )
    problems = [problem for problem in map(contact_problem, model_contacts(model)) if problem]
    if problems:
        raise RuntimeError(
            f"LayerSkip does not fit {architecture} of the installed vLLM "
            f"{version.vllm_version()}: {'; '.join(problems)}. Install a released vLLM of "
            "the supported range, or update vllm-layerskip."
        )


def registered_class(architecture: str) -> str:
    """``module:class`` that vLLM runs for an architecture.

    Raises:
        KeyError: vLLM does not know the architecture.
    """
    from vllm.model_executor.models.registry import ModelRegistry, _LazyRegisteredModel

    model = ModelRegistry.models[architecture]
    if isinstance(model, _LazyRegisteredModel):
        return f"{model.module_name}:{model.class_name}"
    model_class = model.load_model_cls()
    return f"{model_class.__module__}:{model_class.__qualname__}"


def require_supported_vllm() -> None:
    """Raises RuntimeError, with a remedy, when LayerSkip cannot run on this vLLM.

    ``LAYERSKIP_ALLOW_UNTESTED_VLLM=1`` allows another version if every contact fits.
    """
    problem = version.version_problem(version.vllm_version())
    if problem is not None:
        if not version.allows_untested_vllm():
            raise RuntimeError(
                f"{problem} To try this one at your own risk, set {ALLOW_UNTESTED}=1."
            )
        logger.warning(
            "LayerSkip was not tested on vLLM %s, and %s=1 lets it run. It checks that the names "
            "it uses exist, not that they mean the same. Compare its greedy outputs with plain "
            "decoding's.",
            version.vllm_version(),
            ALLOW_UNTESTED,
        )
    problems = check_contacts()
    if problems:
        raise RuntimeError(
            f"LayerSkip does not fit the installed vLLM {version.vllm_version()}: "
            f"{'; '.join(problems)}. Install a released vLLM of the supported "
            "range, or update vllm-layerskip."
        )
