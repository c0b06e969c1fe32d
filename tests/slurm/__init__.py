# SPDX-License-Identifier: Apache-2.0
"""A throw-away Slurm of several nodes on one machine, for tests: real daemons in namespaces."""

from tests.slurm.host import LabUnavailableError, why_not
from tests.slurm.lab import Lab, LabError

__all__ = ["Lab", "LabError", "LabUnavailableError", "why_not"]
