# SPDX-License-Identifier: Apache-2.0
"""Grade-school word problems in GSM8K's format, made from templates and numbers.

    python -m benchmarks.prompts.word_problems 60 > word-problems.jsonl

A line has ``question`` and ``answer``: the steps, one a line, and ``#### N`` with the result. The
texts are this project's own. The same number and seed make the same lines, and a longer file begins
with the lines of a shorter one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from random import Random
from typing import NamedTuple

from benchmarks.engines.command_line import make_parser, positive_int

NAMES = ("Amina", "Bruno", "Chiara", "Dmitri", "Elif", "Farid", "Greta", "Hana", "Ivo", "Jun",
         "Kofi", "Lena", "Mateo", "Nadia", "Oskar", "Priya")  # fmt: skip

Step = tuple[int, str, int]
"""Left operand, operator, right operand."""


class Problem(NamedTuple):
    """A question and the steps to its answer, which is the last step's result."""

    question: str
    steps: Sequence[Step]


Template = Callable[[Random, str], Problem]
"""Makes a problem about a person of this name."""


def result_of(step: Step) -> int:
    """What a step gives.

    Raises:
        ValueError: a division leaves a remainder, or the operator is unknown.
    """
    left, operator, right = step
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    if operator == "*":
        return left * right
    if operator != "/" or left % right:
        raise ValueError(f"{left} {operator} {right} has no whole result. Correct the template.")
    return left // right


def _bakery(random: Random, name: str) -> Problem:
    trays, each, sold = random.randint(3, 9), random.randint(8, 24), random.randint(5, 20)
    return Problem(
        f"{name} bakes {trays} trays of rolls with {each} rolls on each tray. By noon {sold} rolls "
        "are sold. How many rolls are left?",
        [(trays, "*", each), (trays * each, "-", sold)],
    )


def _savings(random: Random, name: str) -> Problem:
    weeks, saved, price = random.randint(4, 12), random.randint(6, 15), random.randint(10, 20)
    return Problem(
        f"{name} saves {saved} euros every week for {weeks} weeks and then buys a book for {price} "
        "euros. How many euros are left?",
        [(weeks, "*", saved), (weeks * saved, "-", price)],
    )


def _bus(random: Random, name: str) -> Problem:
    start, off, on = random.randint(20, 45), random.randint(5, 15), random.randint(3, 18)
    return Problem(
        f"{name} drives a bus with {start} passengers. At the market {off} of them get off and "
        f"{on} others get on. At the school another {on} get on. How many passengers are on the "
        "bus now?",
        [(start, "-", off), (start - off, "+", on), (start - off + on, "+", on)],
    )


def _garden(random: Random, name: str) -> Problem:
    rows, plants, fruits = random.randint(3, 8), random.randint(4, 9), random.randint(5, 12)
    return Problem(
        f"A garden has {rows} rows with {plants} tomato plants in each row. {name} picks {fruits} "
        "tomatoes from every plant. How many tomatoes are picked?",
        [(rows, "*", plants), (rows * plants, "*", fruits)],
    )


def _sharing(random: Random, name: str) -> Problem:
    friends, each, eaten = random.randint(3, 8), random.randint(4, 12), random.randint(2, 9)
    start = friends * each + eaten
    return Problem(
        f"{name} has {start} nuts, eats {eaten} of them and shares the rest equally among "
        f"{friends} friends. How many nuts does each friend get?",
        [(start, "-", eaten), (start - eaten, "/", friends)],
    )


def _reading(random: Random, name: str) -> Problem:
    daily, days, rest_days = random.randint(12, 30), random.randint(4, 9), random.randint(2, 6)
    pages = daily * (days + rest_days)
    return Problem(
        f"{name} reads a book of {pages} pages, {daily} pages a day, and has read for {days} days. "
        "How many more days will the book last?",
        [(daily, "*", days), (pages, "-", daily * days), (pages - daily * days, "/", daily)],
    )


def _tickets(random: Random, name: str) -> Problem:
    adults, children = random.randint(2, 5), random.randint(2, 7)
    price, less = random.randint(9, 15), random.randint(3, 6)
    child = price - less
    return Problem(
        f"A ticket for the museum costs {price} euros, and {less} euros less for children. {name} "
        f"pays for {adults} adults and {children} children. How many euros is that?",
        [
            (adults, "*", price),
            (price, "-", less),
            (children, "*", child),
            (adults * price, "+", children * child),
        ],
    )


def _train(random: Random, name: str) -> Problem:
    first, second = random.randint(2, 4), random.randint(2, 5)
    fast, slow = random.randint(80, 120), random.randint(40, 70)
    return Problem(
        f"{name} takes a train that goes {fast} kilometres an hour for {first} hours, and then "
        f"one that goes {slow} kilometres an hour for {second} hours. How many kilometres long is "
        "the journey?",
        [(fast, "*", first), (slow, "*", second), (fast * first, "+", slow * second)],
    )


def _marbles(random: Random, name: str) -> Problem:
    own, times, given = random.randint(12, 30), random.randint(2, 4), random.randint(3, 10)
    return Problem(
        f"{name} has {own} marbles. A sister has {times} times as many and gives away {given} of "
        f"hers. How many marbles do {name} and the sister have together now?",
        [(own, "*", times), (own * times, "-", given), (own * times - given, "+", own)],
    )


def _paint(random: Random, name: str) -> Problem:
    walls, litres, price = random.randint(3, 6), random.randint(2, 5), random.randint(4, 9)
    have = random.randint(2, litres + 1)
    need = walls * litres
    return Problem(
        f"{name} paints {walls} walls and needs {litres} litres of paint for each. There are "
        f"{have} litres in the cellar. A litre costs {price} euros. How many euros does the "
        "missing paint cost?",
        [(walls, "*", litres), (need, "-", have), (need - have, "*", price)],
    )


def _eggs(random: Random, name: str) -> Problem:
    hens, weekly, box = random.randint(4, 12), random.randint(4, 6), random.choice((2, 3, 4))
    eggs = hens * weekly * box
    return Problem(
        f"Each of {name}'s {hens * box} hens lays {weekly} eggs a week. The eggs are sold in boxes "
        f"of {box * weekly}. How many boxes is that a week?",
        [(hens * box, "*", weekly), (eggs, "/", box * weekly)],
    )


def _work(random: Random, name: str) -> Problem:
    wage, hours, days = random.randint(11, 19), random.randint(4, 8), random.randint(3, 6)
    fare = random.randint(3, 7)
    daily = wage * hours
    return Problem(
        f"{name} earns {wage} euros an hour, works {hours} hours a day and pays {fare} euros a day "
        f"for the bus. How many euros are left after {days} days?",
        [(wage, "*", hours), (daily, "-", fare), (daily - fare, "*", days)],
    )


def _class_trip(random: Random, name: str) -> Problem:
    seats, buses, teachers = random.randint(20, 40), random.randint(2, 5), random.randint(4, 9)
    empty = random.randint(2, 8)
    return Problem(
        f"{name}'s school goes on a trip in {buses} buses with {seats} seats each. {empty} seats "
        f"stay empty, and {teachers} people are teachers. How many pupils go on the trip?",
        [
            (buses, "*", seats),
            (buses * seats, "-", empty),
            (buses * seats - empty, "-", teachers),
        ],
    )


def _mean(random: Random, name: str) -> Problem:
    mean, first, second = random.randint(12, 25), random.randint(1, 9), random.randint(1, 9)
    a, b, c = mean - first, mean + first + second, mean - second
    return Problem(
        f"{name} throws a ball three times: {a}, {b} and {c} metres far. What is the average in "
        "metres?",
        [(a, "+", b), (a + b, "+", c), (a + b + c, "/", 3)],
    )


TEMPLATES: tuple[Template, ...] = (
    _bakery, _savings, _bus, _garden, _sharing, _reading, _tickets, _train, _marbles, _paint,
    _eggs, _work, _class_trip, _mean,
)  # fmt: skip


def problems(seed: int) -> Iterator[Problem]:
    """Without end, the templates in turn."""
    random = Random(seed)
    for template in cycle(TEMPLATES):
        yield template(random, random.choice(NAMES))


def record(problem: Problem) -> dict[str, str]:
    """A line of GSM8K's format."""
    lines = [
        f"{left} {operator} {right} = {result_of((left, operator, right))}"
        for left, operator, right in problem.steps
    ]
    lines.append(f"#### {result_of(problem.steps[-1])}")
    return {"question": problem.question, "answer": "\n".join(lines)}


def _arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("number", type=positive_int, help="Of problems.")
    parser.add_argument("--seed", type=int, default=0, help="Of names and numbers. Default: 0.")
    return parser.parse_args()


def main() -> None:
    args = _arguments()
    for problem in islice(problems(args.seed), args.number):
        print(json.dumps(record(problem)))


if __name__ == "__main__":
    main()
