# SPDX-License-Identifier: Apache-2.0
"""Serving under load: which questions are asked. engine/commands/test_benchmarks.py serves them."""

from __future__ import annotations

import json

from benchmarks.serve.bench import select_questions
from vllm_layerskip import embedded_checkpoint


def test_questions_come_from_every_category_in_turn(tmp_path):
    file = tmp_path / "questions.jsonl"
    questions = [("b", "b0"), ("b", "b1"), ("a", "a0"), ("a", "a long one " * 40), ("c", "c0")]
    file.write_text(
        "\n".join(json.dumps({"category": c, "turns": [text]}) for c, text in questions)
    )
    assert select_questions(file, embedded_checkpoint(), 16) == ["a0", "b0", "c0", "b1"]
