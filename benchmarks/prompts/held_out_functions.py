# SPDX-License-Identifier: Apache-2.0
"""Questions in HumanEval's format for the embedded checkpoint: functions that it never saw.

    python -m benchmarks.prompts.held_out_functions 24 > functions.jsonl

Each is the signature and docstring of a function of a held-out module of the standard library, with
its body as ``canonical_solution``. The module is the category.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator

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
    number = int(sys.argv[1]) if len(sys.argv) > 1 else None
    modules = sorted(load_stdlib().held_out.items())
    by_module = [list(functions(name.removesuffix(".py"), text)) for name, text in modules]
    # The modules in turn, so that a few questions are of many modules.
    longest = max(map(len, by_module))
    turns = [found[i] for i in range(longest) for found in by_module if i < len(found)]
    for record in turns[:number]:
        print(json.dumps(record))


if __name__ == "__main__":
    main()
