# SPDX-License-Identifier: Apache-2.0
"""Real text that every machine has: the sources of Python's standard library.

Whole modules are held out: their text is never seen in training, neither by the
tokenizer nor by the model, and prompts for demos and scores come from them alone.
A larger model may also train on installed packages (``with_packages``).
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_MODULES = (
    "bisect.py",
    "calendar.py",
    "colorsys.py",
    "configparser.py",
    "csv.py",
    "fractions.py",
    "gettext.py",
    "heapq.py",
    "json/encoder.py",
    "mailbox.py",
    "netrc.py",
    "queue.py",
    "sched.py",
    "shelve.py",
    "shlex.py",
    "statistics.py",
    "string.py",
    "textwrap.py",
    "timeit.py",
    "zipfile.py",
    "zipfile/__init__.py",  # Where Python 3.12 and later keep zipfile.
)

# Tests, tables and generated text say little about how people write Python.
_SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "encodings",
        "ensurepip",
        "idle_test",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)


@dataclass(frozen=True)
class Corpus:
    """Source texts by their path inside the standard library."""

    train: dict[str, str]
    held_out: dict[str, str]

    @property
    def digest(self) -> str:
        """SHA-256 over all names and texts: tells whether two machines trained on the same."""
        digest = hashlib.sha256()
        for part in (self.train, self.held_out):
            for name in sorted(part):
                digest.update(f"{name}\0{part[name]}\0".encode())
        return digest.hexdigest()


def load_stdlib(root: Path | None = None) -> Corpus:
    """Read the standard library below ``root`` (default: the running Python's).

    Raises:
        FileNotFoundError: there are no sources below ``root``.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    train: dict[str, str] = {}
    held_out: dict[str, str] = {}
    for path in _source_files(root):
        name = path.relative_to(root).as_posix()
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        (held_out if name in HELD_OUT_MODULES else train)[name] = text
    if not train or not held_out:
        raise FileNotFoundError(
            f"No Python sources below {root}. Install the full standard library "
            "(a zipped or stripped Python has none) or pass another root."
        )
    return Corpus(train, held_out)


def with_packages(corpus: Corpus, roots: Sequence[Path], max_bytes: int) -> Corpus:
    """Add sources of installed packages to the training part, up to ``max_bytes`` in all.

    A file that shares a passage with a held-out module (copies and backports do) stays out.
    Which files are taken depends on their names alone, and is spread over all packages.

    Args:
        roots: folders that hold packages, such as ``site-packages``.
    """
    held_out = {run for text in corpus.held_out.values() for run in _passages(text)}
    train = dict(corpus.train)
    num_bytes = sum(map(len, train.values()))
    files = {
        path.relative_to(root).as_posix(): path for root in roots for path in _source_files(root)
    }
    for name in sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if num_bytes >= max_bytes:
            break
        try:
            text = files[name].read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if held_out.isdisjoint(_passages(text)):
            train[f"packages/{name}"] = text
            num_bytes += len(text)
    return Corpus(train, corpus.held_out)


def _passages(text: str, num_lines: int = 8) -> Iterator[int]:
    """Hashes of all runs of ``num_lines`` lines, blank ones and indentation aside."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for start in range(len(lines) - num_lines + 1):
        yield hash(tuple(lines[start : start + num_lines]))


def _source_files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        if not _SKIPPED_FOLDERS & set(path.relative_to(root).parts[:-1]):
            yield path


def held_out_prompts(
    corpus: Corpus, num_prompts: int, num_lines: int = 24, max_chars: int = 700
) -> list[tuple[str, str]]:
    """``(module, text)`` pairs: consecutive lines out of the middle of held-out modules.

    Modules take turns, so that a few prompts already come from different ones.
    """
    spans: list[list[tuple[str, str]]] = []
    for name, text in sorted(corpus.held_out.items()):
        lines = text.splitlines(keepends=True)
        starts = range(num_lines, max(len(lines) - 2 * num_lines, num_lines + 1), 2 * num_lines)
        cut = ("".join(lines[start : start + num_lines])[:max_chars] for start in starts)
        spans.append([(name, prompt) for prompt in cut if prompt.strip()])
    prompts: list[tuple[str, str]] = []
    for turn in range(max(map(len, spans))):
        prompts += [span[turn] for span in spans if turn < len(span)]
    return prompts[:num_prompts]
