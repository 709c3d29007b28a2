# SPDX-License-Identifier: Apache-2.0
"""Whether a chat template takes a message's content as a text or as a list of parts.

vLLM reads it off the template's syntax: one that loops over the content takes parts
(``vllm.renderers.hf``, ``--chat-template-content-format auto``). Importing vLLM takes ten seconds,
and ``train`` runs without it, so the same question is asked here; tests compare the answers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Literal

from jinja2 import Environment, TemplateError, nodes

ContentFormat = Literal["string", "openai"]
"""vLLM's names: a text, or a list of parts."""

# What these blocks hold is output as if they were not there.
_GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")


@lru_cache(maxsize=32)
def content_format(template: str) -> ContentFormat:
    """The form of content that a template takes."""
    try:
        environment = Environment(extensions=["jinja2.ext.loopcontrols"])
        tree = environment.parse(_GENERATION_BLOCK.sub("", template))
    except TemplateError:
        return "string"
    return "openai" if _loops_over_content(tree) else "string"


def _loops_over_content(tree: nodes.Template) -> bool:
    messages = _message_names(tree)
    of_macros = {
        loop: _content_parameters(tree, macro, messages)
        for macro in tree.find_all(nodes.Macro)
        for loop in macro.find_all(nodes.For)
    }
    for loop in tree.find_all(nodes.For):
        names = of_macros.get(loop, {"content"})
        plain = isinstance(loop.iter, nodes.Name) and loop.iter.name in names
        if plain or _is_content(loop.iter, messages):
            return True
    return False


def _message_names(tree: nodes.Template) -> set[str]:
    """Names of loop variables that hold a message."""
    lists, size = {"messages"}, 0
    while size < len(lists):
        size = len(lists)
        lists.update(
            assign.target.name
            for assign in tree.find_all(nodes.Assign)
            if isinstance(assign.target, nodes.Name) and _is_named(assign.node, lists)
        )
    return {
        loop.target.name
        for loop in tree.find_all(nodes.For)
        if isinstance(loop.target, nodes.Name) and _is_named(loop.iter, lists)
    }


def _content_parameters(tree: nodes.Template, macro: nodes.Macro, messages: set[str]) -> set[str]:
    """A macro's parameters that some call gives a message's content."""
    return {
        name
        for call in tree.find_all(nodes.Call)
        if isinstance(call.node, nodes.Name) and call.node.name == macro.name
        for name, value in _arguments(macro, call)
        if _is_content(value, messages)
    }


def _arguments(macro: nodes.Macro, call: nodes.Call) -> Iterator[tuple[str, nodes.Node]]:
    names = [argument.name for argument in macro.args]
    yield from zip(names, call.args, strict=False)
    yield from ((pair.key, pair.value) for pair in call.kwargs if pair.key in names)


def _is_content(node: nodes.Node, messages: Iterable[str]) -> bool:
    """Whether an expression is ``message.content`` or ``message['content']``."""
    node = _unfiltered(node)
    if isinstance(node, nodes.Getattr):
        key: object = node.attr
    elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        key = node.arg.value
    else:
        return False
    return key == "content" and isinstance(node.node, nodes.Name) and node.node.name in messages


def _is_named(node: nodes.Node, names: Iterable[str]) -> bool:
    node = _unfiltered(node)
    return isinstance(node, nodes.Name) and node.name in names


def _unfiltered(node: nodes.Node) -> nodes.Node:
    """An expression without its filters, tests and slices: of ``messages[1:] | list`` the name."""
    inner: nodes.Node | None = None
    if isinstance(node, nodes.Filter | nodes.Test) or (
        isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
    ):
        inner = node.node
    return node if inner is None else _unfiltered(inner)
