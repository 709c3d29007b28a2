# SPDX-License-Identifier: Apache-2.0
# vLLM's own image with the plugin:
#     docker build -t vllm-layerskip .
#     docker run --gpus all -p 8000:8000 vllm-layerskip MODEL --speculative-model '[self]'
# The entry point (`vllm serve`) is the base image's. A tag of a tested vLLM: docs/compatibility.md.
ARG VLLM_VERSION=0.32.0
FROM vllm/vllm-openai:v${VLLM_VERSION}
# --no-deps: the image's vLLM stays as it is, and the plugin needs nothing else.
RUN --mount=type=bind,target=/src,rw pip install --no-cache-dir --no-deps /src
