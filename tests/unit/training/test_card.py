# SPDX-License-Identifier: Apache-2.0
"""Catch a card whose numbers are not the scores'."""

import json
from pathlib import Path

import vllm_layerskip
from vllm_layerskip.training.card import model_card


def test_the_card_that_ships_says_what_the_scores_say():
    folder = Path(vllm_layerskip.embedded_checkpoint())
    scores = json.loads((folder / "scores.json").read_text())
    shipped = (folder / "README.md").read_text()
    # The module has moved since the checkpoint was made.
    shipped = shipped.replace("vllm_layerskip/training/corpus.py", "vllm_layerskip/files/corpus.py")
    assert model_card(scores) == shipped
    del scores["twin"]
    assert "| twin" not in model_card(scores)
