# SPDX-License-Identifier: Apache-2.0
"""A user who is not root: submits, looks, and stops; on a real Slurm with stand-in engines."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

import pytest

from tests.slurm import standin
from tests.slurm.standin import RDMA_KV

if TYPE_CHECKING:
    from tests.slurm import Lab

pytestmark = pytest.mark.slurm

NOBODY, OTHER = 65534, 65533


def become(user: int) -> tuple[str, ...]:
    """Before a command: as that user. By a shell: what setpriv starts may still read all files."""
    setpriv = ("setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups")
    return (*setpriv, "sh", "-c", 'exec "$@"', "sh")


def test_a_job_of_a_user_who_is_not_root(lab: Lab) -> None:
    if lab.run(*become(NOBODY), sys.executable, "-c", "import rdma_kv_cache, yaml").returncode != 0:
        pytest.skip(f"{sys.prefix} or the repository is not readable for all users")
    place = lab.shared / "user"
    place.mkdir()
    os.chown(place, NOBODY, NOBODY)
    job = standin.submit(lab, place, before=become(NOBODY))

    def rdma_kv(*arguments: str) -> str:
        command = [*RDMA_KV, *arguments, "--runs", "runs"]
        return lab.check(*become(NOBODY), *command, cwd=place, env={"HOME": str(place)})

    try:
        job.wait("READY")
        view = json.loads(rdma_kv("status", str(job.job_id), "--wait", "20", "--json"))
        assert (view["state"], view["verified"]) == ("READY", True)
        assert "serving" in rdma_kv("logs", str(job.job_id), "slurm")
        for node in ("p0", "d0", "d1"):
            owners = lab.check("sh", "-c", "ps -eo uid,args | grep [v]llm.entrypoints", node=node)
            assert {line.split()[0] for line in owners.splitlines()} == {str(NOBODY)}
        key = job.run.api_key_file
        assert view["api_key_file"] == str(key.resolve())
        assert (key.stat().st_uid, key.stat().st_mode & 0o777) == (NOBODY, 0o600)
        assert job.folder.stat().st_mode & 0o777 == 0o700
        assert lab.run(*become(NOBODY), "cat", key).returncode == 0
        assert "Permission denied" in lab.run(*become(OTHER), "cat", key).stderr
        assert "stopped in order" in rdma_kv("stop", str(job.job_id))
        lab.wait_for(job.job_id, "COMPLETED")
    finally:
        lab.run("scancel", str(job.job_id))
