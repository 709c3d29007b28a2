# SPDX-License-Identifier: Apache-2.0
"""Where the numbers of a file of ``benchmarks.prompts.real_prompts`` come from, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.engines.results import command_today


def source(file: str, records: Sequence[dict[str, Any]]) -> str:
    """Questions, settings, machine, versions, commit and command of a file of real prompts."""
    machines = dict.fromkeys(_machine(record["provenance"]) for record in records)
    commits = dict.fromkeys(_commit(record["provenance"]["commit"]) for record in records)
    commands = dict.fromkeys(command_today(record["provenance"]) for record in records)
    settings, questions = records[0]["settings"], records[0]["questions"]
    repeats = settings["repeats"]
    sampling = records[0]["sampling"]
    drawn = f"temperature {sampling['temperature']:g}" if sampling["temperature"] else "greedy"
    ends = "past the end of sequence" if sampling["ignore_eos"] else "to the end of sequence"
    answers = [answer for record in records for answer in record["answers"]]
    same = sum(answer["same_in_every_run"] for answer in answers)
    again = f"; {same} of {len(answers)} answers were the same in every run" if repeats > 1 else ""
    runs = f"{repeats} runs" if repeats > 1 else "one run"
    return (
        f"* From `{file}`: {questions['num_questions']} of the file's {questions['of']} "
        f"questions (SHA-256 {questions['sha256'][:12]}), {drawn}, {ends} or "
        f"{sampling['max_tokens']} tokens{again}.\n"
        f"* {settings['dtype']}, batch {settings['batch_size']}, {runs} after a warm-up; "
        f"{' and '.join(machines)}; commit {' and '.join(commits)}.\n"
        f"* Again: {', then '.join(f'`{command}`' for command in commands)}"
    )


def _machine(facts: dict[str, Any]) -> str:
    gpu = facts["gpu"]
    machine = gpu["name"] if gpu else f"{facts['cpu']['count']} x {facts['cpu']['model']}"
    versions = ", ".join(
        f"{name} {facts['versions'][name]}"
        for name in ("vllm", "torch", "python")
        if name in facts["versions"]
    )
    return f"{machine}; {versions}"


def _commit(commit: dict[str, Any]) -> str:
    return (commit["id"] or "unknown")[:12] + (" with local changes" if commit["dirty"] else "")
