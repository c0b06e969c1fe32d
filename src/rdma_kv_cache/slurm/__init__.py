# SPDX-License-Identifier: Apache-2.0
"""Slurm: what a job asks of it, what it says of a job, and what a job finds of it inside."""
