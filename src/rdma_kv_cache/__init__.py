# SPDX-License-Identifier: Apache-2.0
"""Disaggregated prefill/decode inference on stock vLLM, with the KV cache moved by RDMA writes."""

__version__ = "0.1.0"
