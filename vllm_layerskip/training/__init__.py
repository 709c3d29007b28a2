# SPDX-License-Identifier: Apache-2.0
"""Training with layer dropout and the early-exit loss, and scores of every exit.

``run.train`` is ``vllm-layerskip train``, ``trainer.LayerSkipTrainer`` its Trainer for models and
data of your own (docs/training.md); ``train.py`` makes the embedded checkpoint. Importing this
package imports neither torch nor transformers.
"""
