# SPDX-License-Identifier: Apache-2.0
"""What `rdma-kv serve` shows to the outside, without engines: python -m tests.slurm.served RUN.

Its state file goes through all states, and it answers /ready, /nodes and /metrics on its node's
address. On SIGTERM it drains and ends.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from contextlib import closing

from rdma_kv_cache.cluster.run_dir import RunDir, RunState
from tests.watch.conftest import ENGINES, KEY, Service

START_S = 1.0
DRAIN_S = 0.5


def main() -> None:
    """Serve until SIGTERM."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    run = RunDir(sys.argv[1])
    run.create()
    host = socket.gethostname()
    key_file = str(run.write_api_key(KEY))

    def enter(state: str, stage: str) -> None:
        run.write_state(
            RunState(
                state=state,  # type: ignore[arg-type]
                stage=stage,
                url=service.url,
                api_key_file=key_file,
                pid=os.getpid(),
                host=host,
                engines=ENGINES,
            )
        )

    with closing(Service(host)) as service:
        service.pages["/ready"] = (503, '{"ready": false, "reason": "the run is STARTING"}')
        service.pages["/nodes"] = (200, '{"state": "STARTING", "engines": []}')
        enter("STARTING", "the engines start vLLM")
        time.sleep(START_S)
        service.serve()
        enter("READY", "serving")
        signal.sigwait({signal.SIGTERM})
        enter("DRAINING", "1 requests are in flight")
        time.sleep(DRAIN_S)
        enter("DONE", "stopped")


if __name__ == "__main__":
    main()
