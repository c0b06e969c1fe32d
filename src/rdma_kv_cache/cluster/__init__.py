# SPDX-License-Identifier: Apache-2.0
"""From one MPI world to running, connected and supervised vLLM engines."""
