# SPDX-License-Identifier: Apache-2.0
"""The command `rdma-kv`."""

from rdma_kv_cache.cli.main import main

__all__ = ["main"]
