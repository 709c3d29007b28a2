# SPDX-License-Identifier: Apache-2.0
"""What docs/features.md says of each field of vLLM's ``SamplingParams``."""

from __future__ import annotations

import re
from pathlib import Path

FEATURES = Path(__file__).parents[1] / "docs" / "features.md"
HEADING = "## Sampling parameters"


def fields_of_the_page() -> dict[str, str]:
    """Field by field, the first words of the second column."""
    section = FEATURES.read_text(encoding="utf-8").split(HEADING)[1].split("\n## ")[0]
    found: dict[str, str] = {}
    for row in re.findall(r"^\| (`.*?) \| (.*?) \|", section, re.M):
        for field in re.findall(r"`(\w+)`", row[0]):
            assert field not in found, f"{field} has two rows"
            found[field] = re.split(r"[:;,]", row[1])[0]
    return found


def fields_that(what: str) -> list[str]:
    """The fields of which the page says ``what``."""
    return [field for field, words in fields_of_the_page().items() if words == what]
