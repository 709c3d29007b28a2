# SPDX-License-Identifier: Apache-2.0
"""Make the data of ``finetuning_task.yaml``: requests to an assistant and what they mean.

    python examples/training/make_task.py --output task

A response names the intent and its slots, much as TOPv2's do; requests of ``eval.jsonl`` are not
among those of ``train.jsonl``. The same call always makes the same files.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from pathlib import Path

_TIMES = [f"{hour} {half}" for hour in range(1, 13) for half in ("am", "pm")]
_DAYS = ["today", "tomorrow", "on monday", "on friday", "every day", "next week"]
_PEOPLE = ["anna", "my brother", "the team", "dr smith", "george"]
_THINGS = ["buy milk", "call home", "water the plants", "pay the rent", "stretch"]
_PLACES = ["paris", "the airport", "work", "boston", "the nearest beach"]

_TASKS: list[tuple[str, str, dict[str, list[str]]]] = [
    ("set an alarm for {time} {day}", "CREATE_ALARM", {"time": _TIMES, "day": _DAYS}),
    ("wake me up {day} at {time}", "CREATE_ALARM", {"time": _TIMES, "day": _DAYS}),
    ("remind me to {todo} {day}", "CREATE_REMINDER", {"todo": _THINGS, "day": _DAYS}),
    (
        "tell {contact} to {todo} at {time}",
        "SEND_MESSAGE",
        {"contact": _PEOPLE, "todo": _THINGS, "time": _TIMES},
    ),
    ("what is the weather in {place} {day}", "GET_WEATHER", {"place": _PLACES, "day": _DAYS}),
    (
        "how long is the drive to {place} at {time}",
        "GET_DURATION",
        {"place": _PLACES, "time": _TIMES},
    ),
]


def records() -> list[dict[str, str]]:
    """All requests with their meanings."""
    found = []
    for template, intent, slots in _TASKS:
        for values in itertools.product(*slots.values()):
            filled = dict(zip(slots, values, strict=True))
            # Slots in the order of the request, as a parse has them.
            order = sorted(filled, key=lambda slot: template.index(f"{{{slot}}}"))
            parse = " ".join(f"[SL:{slot.upper()} {filled[slot]} ]" for slot in order)
            found.append(
                {
                    "prompt": template.format(**filled) + "\n",
                    "response": f"[IN:{intent} {parse} ]",
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="Folder of the two files.")
    parser.add_argument("--num-eval", type=int, default=100)
    args = parser.parse_args()
    shuffled = records()
    random.Random(0).shuffle(shuffled)
    args.output.mkdir(parents=True, exist_ok=True)
    parts = {"eval": shuffled[: args.num_eval], "train": shuffled[args.num_eval :]}
    for name, part in parts.items():
        lines = "".join(json.dumps(record) + "\n" for record in part)
        (args.output / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{args.output / name}.jsonl: {len(part)} requests")


if __name__ == "__main__":
    main()
