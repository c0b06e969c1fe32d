# SPDX-License-Identifier: Apache-2.0
"""The half that vLLM loads: `RDMAConnector` and what it needs. Importing this has no side effects."""

from __future__ import annotations

CONNECTOR_NAME = "RDMAConnector"
CONNECTOR_MODULE = "rdma_kv_cache.connector.rdma_connector"


def register() -> None:
    """Entry point of the `vllm.general_plugins` group: make the connector known by its name."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    # vLLM runs plugins in the API server, the engine core and each worker, maybe more than once.
    if CONNECTOR_NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR_NAME, CONNECTOR_MODULE, CONNECTOR_NAME)
