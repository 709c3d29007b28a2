# SPDX-License-Identifier: Apache-2.0
"""Training of draft adapters: LoRA on the early layers of a frozen model, taught by its last layer.

``recipe.DraftRecipe`` is the section ``recipe`` with ``target: frozen`` (docs/training.md).
Importing this package imports neither torch nor transformers.
"""
