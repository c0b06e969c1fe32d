# SPDX-License-Identifier: Apache-2.0
"""Ranks in a container. The batch script and the launcher stay outside, where srun is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rdma_kv_cache.slurm.site import Site

INFINIBAND = "/dev/infiniband"


@dataclass(frozen=True)
class Contained:
    """How to start a rank: options for its srun step, and its command."""

    srun_options: tuple[str, ...]
    command: tuple[str, ...]


def contain(site: Site, program: Sequence[str], folders: Sequence[Path]) -> Contained:
    """Return how to start `program`, in the site's container if it has one.

    `folders` are to be seen inside under their own names: the run folder, a model's. The program
    is the image's own, so its first word should be a name on the image's PATH.
    """
    if site.container == "none" or site.image is None:
        return Contained((), tuple(program))
    mounts = [str(folder) for folder in dict.fromkeys(folders)]
    if site.container == "pyxis":
        # Pyxis mounts /dev/infiniband by a hook of enroot.
        pairs = ",".join(f"{mount}:{mount}" for mount in mounts)
        options = (f"--container-image={site.image}", f"--container-mounts={pairs}")
        return Contained(options, tuple(program))
    binds = ",".join([*mounts, INFINIBAND])
    command = ("apptainer", "exec", "--nv", f"--bind={binds}", site.image, *program)
    return Contained((), command)
