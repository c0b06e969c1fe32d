# SPDX-License-Identifier: Apache-2.0
"""Why a batch cannot start or go on. Wrong lines are not errors of the batch."""

from __future__ import annotations


class BatchError(ValueError):
    """The batch cannot start: the message says why and what to do."""


class ServerGoneError(RuntimeError):
    """The server has not answered at all for the whole retry deadline."""
