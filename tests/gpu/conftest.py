# SPDX-License-Identifier: Apache-2.0
"""Tests on a real GPU; without one they are skipped, with the reason."""

import os

import pytest


def why_no_gpu() -> str:
    """Empty if PyTorch sees a GPU, or if what can run on the CPU shall."""
    if os.environ.get("RKV_GPU_ON_CPU"):
        return ""
    try:
        import torch
    except ImportError as error:
        return f"PyTorch is missing: {error}"
    return "" if torch.cuda.is_available() else "PyTorch sees no GPU"


@pytest.fixture(autouse=True, scope="session")
def gpu() -> None:
    """Skip everything here where there is no GPU."""
    if reason := why_no_gpu():
        pytest.skip(reason)
