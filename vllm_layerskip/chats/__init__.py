# SPDX-License-Identifier: Apache-2.0
"""Chats as the text and token ids that ``vllm serve`` makes of them."""
