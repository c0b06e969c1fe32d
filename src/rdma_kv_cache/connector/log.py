# SPDX-License-Identifier: Apache-2.0
"""Loggers of the connector."""

from __future__ import annotations

import logging


def get_logger(module: str) -> logging.Logger:
    """A logger below vLLM's, whose handlers and level are the only ones in its processes."""
    return logging.getLogger(f"vllm.{module}")
