# SPDX-License-Identifier: Apache-2.0
"""How far the batch of a job is, also while a job that continues it has not begun."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from rdma_kv_cache.batch.state import BatchState, read_state
from rdma_kv_cache.slurm import records
from rdma_kv_cache.watch.folders import open_folder, patiently
from rdma_kv_cache.watch.views import BatchView

if TYPE_CHECKING:
    from rdma_kv_cache.cluster.run_dir import RunDir
    from rdma_kv_cache.watch.folders import JobFolder


def batch_view(folder: JobFolder, *, has_ended: bool) -> BatchView | None:
    """Return what to show of the job's batch; None if nothing is known of one."""
    state = None if folder.kind == "serve" else batch_state(folder)
    if state is None:
        return None
    rate, left_s = state.per_minute, None if has_ended else state.remaining_s
    return BatchView(
        total=state.total,
        answered=state.answered,
        failed=state.failed,
        per_minute=None if rate is None else round(rate, 1),
        remaining_s=None if left_s is None else round(left_s, 1),
    )


def batch_state(folder: JobFolder) -> BatchState | None:
    """Return the counts of the job's newest attempt.

    Before it has any, those that the attempt or the job before it left: it goes on from there.
    """
    if (state := _read(folder.run)) is not None:
        return state
    before = _before(folder)
    if before is None:
        return None
    return msgspec.structs.replace(before, done_before=before.done, seconds=0.0)


def _before(folder: JobFolder) -> BatchState | None:
    for _, run in sorted(folder.attempts().items(), reverse=True):
        if (state := _read(run)) is not None:
            return state
    record = folder.record
    if record is None or record.predecessor is None:
        return None
    path = records.job_folder(record.path.parent, record.name, record.predecessor)
    earlier = open_folder(path)
    return None if earlier is None else batch_state(earlier)


def _read(run: RunDir) -> BatchState | None:
    try:
        return patiently(lambda: read_state(run.batch_file))
    except (OSError, msgspec.MsgspecError):
        return None
