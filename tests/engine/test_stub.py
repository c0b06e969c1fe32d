# SPDX-License-Identifier: Apache-2.0
"""The committed type stub is what pybind11-stubgen makes of the built extension."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import rdma_kv_cache

COMMITTED = Path(rdma_kv_cache.__file__).parent / "_native.pyi"


def test_stub_has_not_drifted(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pybind11_stubgen", "rdma_kv_cache._native", "-o", str(tmp_path),
         "--exit-code"],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    generated = tmp_path / "rdma_kv_cache" / "_native.pyi"
    assert generated.read_text() == COMMITTED.read_text(), "run `make stubs`"
