# SPDX-License-Identifier: Apache-2.0
"""Files that users name, and files that are written whole or not at all."""
