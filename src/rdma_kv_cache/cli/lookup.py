# SPDX-License-Identifier: Apache-2.0
"""What `list`, `status`, `logs` and `stop` share: which job is meant, and how it is looked at."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rdma_kv_cache.cli import common

if TYPE_CHECKING:
    from rdma_kv_cache.watch.folders import JobFolder
    from rdma_kv_cache.watch.views import BatchView
    from rdma_kv_cache.watch.watcher import Watcher

runs_option = click.option(
    "--runs",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the run folders.  [default: site.runs of the site file]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")


def open_watcher(runs: Path | None) -> Watcher:
    """Return what looks at the jobs under `runs` (None: where the site keeps them)."""
    from rdma_kv_cache.config import JobError
    from rdma_kv_cache.slurm.site import load_site
    from rdma_kv_cache.watch.watcher import Watcher

    try:
        site = load_site(os.environ)
    except JobError as error:
        raise common.InputError(str(error)) from error
    folder = site.runs_path if runs is None else runs.absolute()
    return Watcher(folder, login_host=site.login_host or "")


def find_job(watcher: Watcher, text: str | None) -> JobFolder:
    """Return the job that the user means; without a text the only one that has not ended.

    An unknown or ambiguous job becomes an InputError.
    """
    from rdma_kv_cache.watch.folders import NoSuchJob

    if text is not None:
        try:
            return watcher.find(text)
        except NoSuchJob as error:
            raise common.InputError(f"{error}. All of them: rdma-kv list --all") from error
    folders = watcher.folders()
    views = watcher.look(folders)
    active = [folder for folder, view in zip(folders, views, strict=True) if not view.has_ended]
    if len(active) == 1:
        return active[0]
    names = ", ".join(f"{folder.label} ({folder.name})" for folder in active)
    raise common.InputError(
        f"say which JOB: {names}" if active else f"no job that has not ended in {watcher.runs}"
    )


def describe(batch: BatchView) -> str:
    """Say how far a batch is."""
    from rdma_kv_cache.batch.display import clock

    text = f"{batch.answered:,} answered, {batch.failed:,} failed, of {batch.total:,}"
    if batch.per_minute is not None:
        text += f"; {batch.per_minute:,.0f} a minute"
    return text if batch.remaining_s is None else f"{text}, {clock(batch.remaining_s)} left"
