# SPDX-License-Identifier: Apache-2.0
"""A file of prompts in, a file of answers out: `vllm-layerskip generate`."""
