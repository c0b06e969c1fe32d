# SPDX-License-Identifier: Apache-2.0
"""Slurm's way to write a duration."""

from __future__ import annotations


def seconds(text: str) -> int:
    """Return the seconds of a --time value: m, m:s, h:m:s, d-h, d-h:m or d-h:m:s.

    Raises ValueError.
    """
    days, dash, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if dash:
        hours, minutes, secs = [*parts, 0, 0][:3]
        return int(days) * 86400 + hours * 3600 + minutes * 60 + secs
    if len(parts) == 3:
        return parts[0] * 3600 + parts[1] * 60 + parts[2]
    return parts[0] * 60 + (parts[1] if len(parts) == 2 else 0)
