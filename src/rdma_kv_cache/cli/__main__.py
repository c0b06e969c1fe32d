# SPDX-License-Identifier: Apache-2.0
"""`python -m rdma_kv_cache.cli` is `rdma-kv`."""

from rdma_kv_cache.cli.main import main

main(prog_name="rdma-kv")
