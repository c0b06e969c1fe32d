# SPDX-License-Identifier: Apache-2.0
"""What jobs there are and how they fare: run folders, Slurm's word and the service's own, joined."""
