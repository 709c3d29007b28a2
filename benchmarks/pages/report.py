# SPDX-License-Identifier: Apache-2.0
"""Result files as Markdown: ``python -m benchmarks.pages.report benchmarks/results/*.json``.

Every file's tables come with their commit, versions, machine and command.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.decode.summary import HEADER, columns, decode_results, model_name
from benchmarks.engines.command_line import make_parser, mistakes_reported
from benchmarks.engines.markdown import markdown
from benchmarks.engines.results import Record, command_today, load_existing
from benchmarks.serve.summary import SERVE_HEADER, is_serve_record, serve_columns


def report(path: Path, bandwidth: float | None = None) -> str:
    """The tables of one result file, one for each model.

    Raises:
        UserError: the file does not exist, or is no result file.
    """
    records = load_existing(path)
    parts = [f"## {path.name}"]
    by_model = sorted(records, key=model_name)
    for name, group in groupby(by_model, key=model_name):
        parts += [f"### {name}", *_tables(list(group), bandwidth)]
    parts.append(_source(records))
    return "\n\n".join(parts)


def _tables(records: list[Record], bandwidth: float | None) -> Iterable[str]:
    serve = [record for record in records if is_serve_record(record)]
    decode = [record for record in records if not is_serve_record(record)]
    if decode:
        yield " ".join([_caption(decode), *_notes(decode)])
        yield markdown(HEADER, map(columns, decode_results(decode, bandwidth)))
        yield from _engines(decode)
    if serve:
        yield markdown(SERVE_HEADER, map(serve_columns, serve))


def _caption(records: Sequence[Record]) -> str:
    settings = records[0]["settings"]
    is_real = settings["synthetic_acceptance_length"] is None
    drafts = "real acceptance" if is_real else "synthetic acceptance"
    return (
        f"Steady decoding of {settings['output_len']} tokens after {settings['prompts']} prompts, "
        f"{settings['dtype']}, greedy, {drafts}; median of {settings['repeats']} run(s)"
        f"{_rounds(records)}. Limits: "
        "the roofline of `vllm_layerskip/measuring/roofline.py`."
    )


def _rounds(records: Sequence[Record]) -> str:
    measured = [record for record in records if record["status"] == "ok"]
    num_rounds = max((record["settings"].get("round", 1) for record in measured), default=1)
    if num_rounds == 1:
        return ""
    engines = (
        "engines that stay alive and take turns"
        if all(record.get("interleaved") for record in measured)
        else "engines of their own"
    )
    return (
        f", medians over {num_rounds} rounds A B A B with {engines}, and the range of the rounds' "
        "speed-ups"
    )


def _notes(records: Sequence[Record]) -> Iterable[str]:
    """The records' notes on their settings, each once."""
    return dict.fromkeys(record["note"] for record in records if "note" in record)


def _engines(records: Sequence[Record]) -> Iterable[str]:
    """Each engine's start time and memory."""
    header: tuple[str, ...] = (
        "mode", "setting", "start s", "weights GB", "draft weights GB", "KV cache GB",
        "KV cache tokens", "exit states MB", "GPU GB used",
    )  # fmt: skip
    seen: dict[tuple[str, str], dict[str, Any]] = {}
    for result in decode_results(records):
        engine = result.record.get("engine")
        if engine is not None and "memory" in engine:
            seen.setdefault((result.mode, result.setting), engine)
    if not seen:
        return
    body = [[*key, *_engine_columns(engine)] for key, engine in seen.items()]
    twins = [_size(engine["memory"], "twin_bytes", 1e6) for engine in seen.values()]
    if any(twins):
        header += ("draft twin MB",)
        body = [[*columns, twin] for columns, twin in zip(body, twins, strict=True)]
    yield markdown(header, body)


def _engine_columns(engine: dict[str, Any]) -> list[str]:
    memory = engine["memory"]
    return [
        f"{engine['start_s']:.1f}{' (empty caches)' if engine['fresh_cache'] else ''}",
        _size(memory, "weights_bytes", 1e9),
        _size(memory, "draft_weights_bytes", 1e9),
        _size(memory, "kv_cache_bytes", 1e9),
        str(engine["kv_capacity_tokens"]),
        _size(memory, "exit_state_bytes", 1e6),
        _size(memory, "gpu_used_bytes", 1e9),
    ]


def _size(memory: dict[str, int], name: str, unit: float) -> str:
    return f"{memory[name] / unit:.2f}" if name in memory else ""


def _source(records: Sequence[Record]) -> str:
    """Machines, commits, versions and commands of the tables."""
    lines = []
    for facts in _distinct(record["provenance"] for record in records):
        gpu = facts["gpu"]
        machine = (
            f"{gpu['name']} (driver {gpu['driver']})"
            if gpu
            else f"{facts['cpu']['count']} x {facts['cpu']['model']}"
        )
        versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        commit = facts["commit"]
        dirty = " with local changes" if commit["dirty"] else ""
        lines.append(f"* {machine}; commit {commit['id'] or 'unknown'}{dirty}; {versions}")
    commands = dict.fromkeys(command_today(record["provenance"]) for record in records)
    lines += [f"* `{command}`" for command in commands]
    return "\n".join(lines)


def _distinct(all_facts: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    known: dict[str, dict[str, Any]] = {}
    for facts in all_facts:
        same = {name: facts[name] for name in ("gpu", "cpu", "commit", "versions")}
        known.setdefault(repr(same), facts)
    return list(known.values())


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--bandwidth", type=float, help="TB/s of the GPU, for the limits.")
    parser.add_argument("--output", type=Path, help="Markdown file; default: standard output.")
    args = parser.parse_args()
    with mistakes_reported(parser):
        text = "\n\n".join(report(path, args.bandwidth) for path in args.files) + "\n"
    if args.output is None:
        sys.stdout.write(text)
    else:
        args.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
