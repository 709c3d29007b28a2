# SPDX-License-Identifier: Apache-2.0
"""Where each exit would draft what the model says: acceptance of every (E, K) from one pass.

A draft counts only if all drafts before it were accepted, so what precedes it is the target's own
greedy text. Hence one forward over greedy continuations, with the argmax of every exit, tells
which drafts of every exit layer are accepted; no run per E and no draft loop is needed. A
continuation ends where the model ends it: after an end-of-sequence token the text repeats itself,
and acceptance measured there would be too high.

Shapes: P prompts, N generated tokens of a prompt, X exit layers.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vllm_layerskip.errors import UserError
from vllm_layerskip.files.whole import whole_file


@dataclass(frozen=True, eq=False)
class Agreement:
    """Matches of exits and target on greedy continuations.

    ``matches`` holds, for each prompt, booleans ``[X, N - 1]``: the first generated token comes
    from the prefill and is never drafted.
    """

    exit_layers: tuple[int, ...]
    matches: tuple[npt.NDArray[np.bool_], ...]
    target_agreement: float
    """Share of tokens at which the one pass agrees with the generation; 1 but for rounding."""

    @property
    def num_tokens(self) -> int:
        """Tokens that were compared."""
        return sum(rows.shape[1] for rows in self.matches)

    def rate(self, exit_layer: int) -> float:
        """Share of tokens that the exit predicts as the target does."""
        index = self.exit_layers.index(exit_layer)
        return float(sum(rows[index].sum() for rows in self.matches)) / max(self.num_tokens, 1)

    def acceptance_lengths(self, max_num_speculative_tokens: int) -> npt.NDArray[np.float64]:
        """``[X, K]``: mean tokens per verification (accepted drafts and one more) with 1..K
        drafts; NaN where no row is long enough for one whole step.

        A step that would run past a continuation's end does not count: nobody knows how many
        drafts it would have accepted.
        """
        runs, lengths = self._runs()
        num_speculative_tokens = np.arange(1, max_num_speculative_tokens + 1)
        # One walk for each exit layer, prompt and K, all at once.
        position = np.zeros(
            (*runs.shape[:2], len(num_speculative_tokens)), dtype=np.int64
        )  # [X, P, K]
        num_steps, num_tokens = np.zeros_like(position), np.zeros_like(position)
        while True:
            whole = position + num_speculative_tokens < lengths[None, :, None]
            if not whole.any():
                break
            at = np.minimum(position, max(runs.shape[2] - 1, 0))
            advance = np.minimum(np.take_along_axis(runs, at, axis=2), num_speculative_tokens) + 1
            num_steps += whole
            num_tokens += np.where(whole, advance, 0)
            position += np.where(whole, advance, 0)
        with np.errstate(invalid="ignore"):
            return num_tokens.sum(axis=1) / num_steps.sum(axis=1)

    def _runs(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """How many matches in a row begin at each token, ``[X, P, N]``, and the rows' lengths."""
        lengths = np.array([rows.shape[1] for rows in self.matches], dtype=np.int64)
        runs = np.zeros((len(self.exit_layers), len(lengths), lengths.max(initial=0)), np.int64)
        for prompt, rows in enumerate(self.matches):
            run = np.zeros(len(self.exit_layers), np.int64)
            for token in reversed(range(rows.shape[1])):
                run = np.where(rows[:, token], run + 1, 0)
                runs[:, prompt, token] = run
        return runs, lengths

    def save(self, path: Path, identity: str) -> None:
        """Write ``path`` (``.npz``); ``identity`` says what the matches depend on."""
        with whole_file(path) as draft, draft.open("wb") as file:
            np.savez_compressed(
                file,
                identity=np.array(identity),
                exit_layers=np.array(self.exit_layers),
                target_agreement=np.array(self.target_agreement),
                lengths=np.array([rows.shape[1] for rows in self.matches]),
                matches=np.concatenate(self.matches, axis=1),
            )

    @classmethod
    def load(cls, path: Path) -> tuple[Agreement, str]:
        """An agreement and its identity.

        Raises:
            UserError: the file cannot be read or is none of ``save``.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                ends = np.cumsum(file["lengths"])[:-1]
                agreement = cls(
                    exit_layers=tuple(int(layer) for layer in file["exit_layers"]),
                    matches=tuple(np.split(file["matches"], ends, axis=1)),
                    target_agreement=float(file["target_agreement"]),
                )
                return agreement, str(file["identity"])
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(
                f"--agreement {path}: this is no file of agreement statistics ({error}). Give an "
                "agreement.npz of an earlier run, or leave it out."
            ) from None


def matches_of(
    predictions: npt.NDArray[np.int64], continuation: Sequence[int]
) -> npt.NDArray[np.bool_]:
    """``[X, N - 1]`` matches of one prompt.

    Args:
        predictions: ``[X, N]``, each exit's argmax where the target said ``continuation``.
    """
    return predictions[:, 1:] == np.asarray(continuation)[None, 1:]
