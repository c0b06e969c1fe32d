# SPDX-License-Identifier: Apache-2.0
"""vLLM finds the connector by its plugin entry point and by its module path."""

from __future__ import annotations

from importlib.metadata import entry_points
from types import SimpleNamespace

import pytest
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import SupportsHMA

from rdma_kv_cache.connector import CONNECTOR_MODULE, CONNECTOR_NAME
from rdma_kv_cache.connector.settings import Settings

EXTRA = {"incarnation": str(2**64 - 1), "bootstrap_socket": "/run/x.sock"}


def test_the_plugin_registers_once_however_often_it_runs() -> None:
    (plugin,) = (p for p in entry_points(group="vllm.general_plugins") if p.name == "rdma_kv_cache")
    register = plugin.load()
    register()
    register()
    config = KVTransferConfig(kv_connector=CONNECTOR_NAME, kv_role="kv_producer")
    assert issubclass(KVConnectorFactory.get_connector_class(config), SupportsHMA)


def test_the_module_path_needs_no_plugin() -> None:
    config = KVTransferConfig(
        kv_connector=CONNECTOR_NAME,
        kv_connector_module_path=CONNECTOR_MODULE,
        kv_role="kv_consumer",
    )
    assert KVConnectorFactory.get_connector_class(config).__name__ == CONNECTOR_NAME


def test_settings_keep_all_64_bits_of_the_incarnation() -> None:
    config = SimpleNamespace(engine_id="prefill-0", kv_connector_extra_config=EXTRA)
    assert Settings.from_kv_transfer_config(config).incarnation == 2**64 - 1


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({**EXTRA, "qps": 4}, r"unknown keys \['qps'\]; valid: .*qps_per_peer"),
        ({}, r"lacks \['bootstrap_socket', 'incarnation'\]: .*started by an engine rank"),
    ],
)
def test_wrong_settings_say_what_is_valid(extra: dict[str, str], message: str) -> None:
    config = SimpleNamespace(engine_id="prefill-0", kv_connector_extra_config=extra)
    with pytest.raises(ValueError, match=message):
        Settings.from_kv_transfer_config(config)
