# SPDX-License-Identifier: Apache-2.0
"""Guests boot with working verbs, and what is done to them happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.guest import GuestRun, Guests, run_guests, why_not

if TYPE_CHECKING:
    from collections.abc import Iterator

LANES = [
    pytest.param(False, id="qemu", marks=pytest.mark.skipif(why_not() is not None, reason=f"{why_not()}")),
]
