# SPDX-License-Identifier: Apache-2.0
"""What the engine rank tells the connector through `kv_connector_extra_config`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Settings:
    """Connector settings; times in seconds, sizes in bytes.

    `incarnation` names one life of this engine: a restarted engine has another one, and nothing
    that was meant for the old one is accepted by the new one. `piecewise_graphs` is read before
    there are Settings, see RDMAConnector.
    """

    engine: str
    incarnation: int
    bootstrap_socket: str
    bind_host: str = "127.0.0.1"
    backend: str = "auto"
    devices: str = "auto"
    gid_index: int = -1
    traffic_class: int = 0
    service_level: int = 0
    block_size: int = 1 << 20
    queue_depth: int = 1024
    qps_per_peer: int = 2
    peer_timeout_s: float = 5.0
    connect_timeout_s: float = 15.0
    transfer_timeout_s: float = 300.0
    cancel_timeout_s: float = 5.0
    lease_s: float = 30.0
    checksum: bool = False
    piecewise_graphs: bool = False
    link: str = ""
    trace_file: str = ""

    @classmethod
    def from_kv_transfer_config(cls, config: Any) -> Settings:
        """Read vLLM's KVTransferConfig. Raises ValueError on a missing or unknown key."""
        extra = dict(config.kv_connector_extra_config)
        fields = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(extra) - fields)
        if unknown:
            raise ValueError(
                f"kv_connector_extra_config: unknown keys {unknown}; valid: {sorted(fields)}"
            )
        missing = sorted({"incarnation", "bootstrap_socket"} - set(extra))
        if missing:
            raise ValueError(
                f"kv_connector_extra_config lacks {missing}: "
                "RDMAConnector is started by an engine rank ('rdma-kv serve' or 'rdma-kv batch')"
            )
        # JSON numbers are doubles in many tools, so the 64-bit incarnation travels as a string.
        extra["incarnation"] = int(extra["incarnation"])
        return cls(engine=config.engine_id, **extra)
