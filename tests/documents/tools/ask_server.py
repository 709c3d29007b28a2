# SPDX-License-Identifier: Apache-2.0
"""Run a document's ``vllm serve MODEL FLAGS``: start it, see that it drafts, stop it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, os.environ["DOCUMENTS_ENGINE_TESTS"])
from servers import MODEL_NAME, Server  # noqa: E402


def main() -> None:
    model, *flags = sys.argv[1:]
    if "--served-model-name" in flags:  # The last one counts.
        flags.insert(flags.index("--served-model-name") + 1, MODEL_NAME)
    server = Server(Path(model), flags, Path("server.log"))
    try:
        answer = server.complete("def main():\n", max_tokens=24, ignore_eos=True)
        assert len(answer["choices"][0]["token_ids"]) == 24, answer
        if not any("early-exit" in flag for flag in flags):
            drafted = server.counter("num_draft_tokens_total")
            accepted = server.counter("num_accepted_tokens_total")
            print(f"drafted {drafted:.0f}, accepted {accepted:.0f}")
            assert 0 < accepted < drafted
    finally:
        server.close()


if __name__ == "__main__":
    main()
