# SPDX-License-Identifier: Apache-2.0
"""One rank of a test world: world.py JOB MODE FOLDER; writes FOLDER/rank-N.json."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from rdma_kv_cache.cluster.world import World, join
from rdma_kv_cache.config import JobError, load_job


def exchange(world: World) -> dict[str, Any]:
    """Every rank sends its name and a part of its own length to every other."""
    url = world.share_url("http://127.0.0.1:1234" if world.rank == 0 else "ignored")
    outgoing = {
        hello.engine: f"{world.engine}>{hello.engine}".encode() * (1 + 1000 * world.rank)
        for hello in world.hellos
        if hello.engine not in (world.engine, "orchestrator")
    }
    received = world.exchange(outgoing)
    world.barrier()
    return {
        "url": url,
        "engine": world.engine,
        "role": world.role,
        "secret": world.secret.hex(),
        "incarnations": [hello.incarnation for hello in world.hellos],
        "peers": [hello.engine for hello in world.peers()],
        "host": world.bind_host(),
        "received": {engine: [len(data), data[:40].decode()] for engine, data in received.items()},
    }


def die_after_barrier(world: World) -> dict[str, Any]:
    """Rank 1 is killed; the others go on."""
    world.barrier()
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1)
    return {"engine": world.engine}


def one_rank_missing(world: World) -> dict[str, Any]:
    """Rank 1 never comes to the barrier; the others give up and say so."""
    if world.rank == 1:
        time.sleep(2)
        return {"error": "", "took_s": 0}
    world.timeout_s = 0.5
    return failing_barrier(world)


def cancelled(world: World) -> dict[str, Any]:
    """Rank 1 never comes; the others are told to stop while they wait."""
    if world.rank == 1:
        time.sleep(2)
        return {"error": "", "took_s": 0}
    threading.Timer(0.3, world.cancel).start()
    return failing_barrier(world)


def failing_barrier(world: World) -> dict[str, Any]:
    started, cpu = time.monotonic(), time.process_time()
    try:
        world.barrier()
    except RuntimeError as error:
        return {
            "error": str(error),
            "took_s": time.monotonic() - started,
            "cpu_s": time.process_time() - cpu,
        }
    return {"error": "no error", "took_s": 0}


def main() -> None:
    job_file, mode, folder = sys.argv[1:]
    job = load_job(job_file, env={})
    if mode == "other_tp" and os.environ.get("PMI_RANK") == "2":
        model = job.model.model_copy(update={"tensor_parallel_size": 2})
        job = job.model_copy(update={"model": model})
    try:
        world = join(job)
    except JobError as error:
        rank = os.environ.get("PMI_RANK", "0")
        result: dict[str, Any] = {"job_error": str(error)}
    else:
        rank = str(world.rank)
        result = {} if mode == "other_tp" else globals()[mode](world)
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)


main()
