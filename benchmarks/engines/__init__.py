# SPDX-License-Identifier: Apache-2.0
"""How the engine of a mode is made, and what it says about itself."""
