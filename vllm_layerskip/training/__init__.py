# SPDX-License-Identifier: Apache-2.0
"""The training recipe: corpus, tokenizer, layer dropout, early-exit loss, scores."""
