# SPDX-License-Identifier: Apache-2.0
"""Tests of what shows and ends jobs: without Slurm, and on a real one in tests/slurm."""
