# SPDX-License-Identifier: Apache-2.0
"""Runs Slurm's own programs (squeue, sacct, scancel, …), bounded, and says plainly why one failed."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

# Without a slurm.conf or a controller Slurm's programs go on trying for about a minute.
TIMEOUT_S = 30.0

Runner: TypeAlias = Callable[[Sequence[str]], str]
"""Runs a command line and returns its standard output. Raises SlurmError."""


class SlurmError(RuntimeError):
    """A program of Slurm is missing or failed; the text says which, and why."""


def run(command: Sequence[str], env: Mapping[str, str] | None = None) -> str:
    """Run `command` and return its standard output. Raises SlurmError.

    Without an `env` it gets this process's, but for what would change what is printed: a user's
    SQUEUE_* and SACCT_* variables and time format.
    """
    program = command[0]
    path = os.environ.get("PATH", os.defpath)
    if shutil.which(program, path=path) is None:
        raise SlurmError(f"no {program} on PATH ({path})")
    try:
        done = subprocess.run(
            command,
            env=_plain_environment() if env is None else env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise SlurmError(
            f"{program} did not answer within {TIMEOUT_S:g} s: is there a slurm.conf, and does "
            "slurmctld run?"
        ) from error
    except OSError as error:
        raise SlurmError(f"{program}: {error.strerror}") from error
    if done.returncode != 0:
        # The last line is the fatal one; those before it tell how it came to that.
        lines = done.stderr.decode(errors="replace").split("\n")
        said = next((line for line in reversed(lines) if line.strip()), "")
        said = said.removeprefix(f"{program}: ") or f"exit code {done.returncode}"
        raise SlurmError(f"{program}: {said}")
    return done.stdout.decode(errors="replace")


def _plain_environment() -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SQUEUE_", "SACCT_"))
    }
    return {**kept, "SLURM_TIME_FORMAT": "standard"}
