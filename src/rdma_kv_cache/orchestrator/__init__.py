# SPDX-License-Identifier: Apache-2.0
"""Rank 0: the OpenAI-compatible service, its router, and the supervision of the engines."""
