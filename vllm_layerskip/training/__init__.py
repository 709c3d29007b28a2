# SPDX-License-Identifier: Apache-2.0
"""Training with layer dropout and the early-exit loss.

``run.train`` is ``vllm-layerskip train``, ``trainer.LayerSkipTrainer`` its Trainer for models and
data of your own (docs/training.md). ``embedded_checkpoint`` makes the checkpoint that ships with
the package. Importing this package imports neither torch nor transformers.
"""
