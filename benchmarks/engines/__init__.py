# SPDX-License-Identifier: Apache-2.0
"""What every benchmark uses: settings, the engine of a mode, questions, result files."""
