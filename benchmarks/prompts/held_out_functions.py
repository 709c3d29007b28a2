# SPDX-License-Identifier: Apache-2.0
"""Questions in HumanEval's format for the embedded checkpoint: functions that it never saw.

    python -m benchmarks.prompts.held_out_functions 24 > functions.jsonl

A prompt is the signature and docstring of a function in one of the standard library's held-out
modules; its body is the ``canonical_solution``, and the module is the category.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator

from benchmarks.engines.command_line import make_parser, positive_int
from benchmarks.engines.questions import in_turn
from vllm_layerskip.files.corpus import load_stdlib


def functions(module: str, source: str) -> Iterator[dict[str, str]]:
    """The functions of a module that have a docstring and a body."""
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef) or ast.get_docstring(node) is None:
            continue
        docstring, *body = node.body
        if not body:
            continue
        yield {
            "task_id": f"{module}/{node.name}-{node.lineno}",
            "prompt": "".join(lines[node.lineno - 1 : docstring.end_lineno]),
            "canonical_solution": "".join(lines[body[0].lineno - 1 : body[-1].end_lineno]),
            "entry_point": node.name,
        }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("number", type=positive_int, nargs="?", help="Of questions. Default: all.")
    number = parser.parse_args().number
    modules = sorted(load_stdlib().held_out.items())
    by_module = [list(functions(name.removesuffix(".py"), text)) for name, text in modules]
    # The modules in turn, so that a few questions come from many modules.
    for record in in_turn(by_module)[:number]:
        print(json.dumps(record))


if __name__ == "__main__":
    main()
