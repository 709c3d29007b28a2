# SPDX-License-Identifier: Apache-2.0
"""A small instruct model to try LayerSkip with, out of the package index: no model hub needed."""
