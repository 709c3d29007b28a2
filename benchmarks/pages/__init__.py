# SPDX-License-Identifier: Apache-2.0
"""Reports of result files, and the tables and figures of documents."""
