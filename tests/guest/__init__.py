# SPDX-License-Identifier: Apache-2.0
"""Throw-away guests with real kernel verbs (Soft-RoCE), for tests where there is no RDMA NIC."""

from tests.guest.host import GuestUnavailableError
from tests.guest.result import GuestRun
from tests.guest.run import Guests, run_guests, why_not

__all__ = ["GuestRun", "GuestUnavailableError", "Guests", "run_guests", "why_not"]
