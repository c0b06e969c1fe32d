# SPDX-License-Identifier: Apache-2.0
"""Ranks in a container: how they are started."""

from __future__ import annotations

from pathlib import Path

from rdma_kv_cache.slurm.container import contain
from rdma_kv_cache.slurm.site import Site

RANK = ("rdma-kv", "rank")
FOLDERS = (Path("/runs"), Path("/models"), Path("/runs"))


def test_no_container() -> None:
    contained = contain(Site(), RANK, FOLDERS)
    assert (contained.srun_options, contained.command) == ((), RANK)


def test_apptainer() -> None:
    contained = contain(Site(container="apptainer", image="/img/vllm.sif"), RANK, FOLDERS)
    binds = "--bind=/runs,/models,/dev/infiniband"
    assert contained.srun_options == ()
    assert contained.command == ("apptainer", "exec", "--nv", binds, "/img/vllm.sif", *RANK)


def test_pyxis() -> None:
    contained = contain(Site(container="pyxis", image="vllm.sqsh"), RANK, FOLDERS)
    mounts = "--container-mounts=/runs:/runs,/models:/models"
    assert contained.srun_options == ("--container-image=vllm.sqsh", mounts)
    assert contained.command == RANK
