# SPDX-License-Identifier: Apache-2.0
"""Runs a program so that nothing of it is left when its owner dies or the program ends.

vLLM's engine core and workers outlive a killed API server, and a process can ask the kernel to
end only itself with its parent (PR_SET_PDEATHSIG). So this small process stands between: it
adopts every orphan below it (PR_SET_CHILD_SUBREAPER), and ends them all when the program has
ended, on SIGQUIT, or when its parent is gone. SIGTERM and SIGINT are passed to the program, which
has a process group of its own.

It also stands between mpiexec and each rank. MPICH's proxy (5.0.2) ends all ranks when it reaps
one that died of a signal, in spite of -disable-auto-cleanup (seen in 5 of 15 runs); a guardian
never ends by its program's signal.

It is run by path, without the package, and uses the standard library alone:
    python -I -S guardian.py PARENT_PID PROGRAM [ARGUMENT...]        (PARENT_PID 0: any parent)
It prints "pid N" of the program, and exits with the program's code, or 128 + its signal. The
program's output goes to the guardian's stderr.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

# prctl(2)
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

KILL_ALL = signal.SIGQUIT
WATCHED = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, KILL_ALL)
# A process in uninterruptible sleep ignores SIGKILL; waiting longer does not help it.
SWEEP_LIMIT_S = 10.0
SWEEP_POLL_S = 0.01

_libc = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, value: int) -> None:
    """Call prctl(2). Raises OSError."""
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"prctl({option}, {value}): {os.strerror(errno)}")


def descendants(pid: int) -> list[int]:
    """Return the pids of all processes below `pid`."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text(errors="replace")
        except OSError:
            continue
        # "pid (name) state ppid ...": the name may hold spaces and brackets.
        parent = int(stat.rpartition(")")[2].split()[1])
        children.setdefault(parent, []).append(int(entry.name))
    found = []
    stack = [pid]
    while stack:
        below = children.get(stack.pop(), [])
        found += below
        stack += below
    return found


def reap() -> dict[int, int]:
    """Collect every child that has ended: pid -> return code, as subprocess gives it."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended[pid] = os.waitstatus_to_exitcode(status)


def sweep() -> dict[int, int]:
    """Kill and collect everything below this process."""
    ended = reap()
    deadline = time.monotonic() + SWEEP_LIMIT_S
    while time.monotonic() < deadline:
        below = descendants(os.getpid())
        if not below:
            break
        for pid in below:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(SWEEP_POLL_S)
        ended.update(reap())
    return ended


def guard(pid: int) -> int:
    """Pass signals on until the program has ended or all is to be killed; return its code."""
    while True:
        received = signal.sigwait(WATCHED)
        if received == signal.SIGCHLD:
            code = reap().get(pid)
            if code is not None:
                sweep()
                return code
        elif received == KILL_ALL:
            return sweep().get(pid, -signal.SIGKILL)
        else:
            os.kill(pid, received)


def _enter_program() -> None:
    # A signal for a whole group (mpiexec sends such ones) must not reach the program twice.
    os.setpgid(0, 0)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)


def guarded(program: Sequence[str], parent: int) -> list[str]:
    """Return the command line that runs `program` under a guardian that is a child of `parent`."""
    return [sys.executable, "-I", "-S", __file__, str(parent), *program]


def main(arguments: list[str]) -> int:
    """Run the program; return its exit code, or 128 + the signal that ended it, as shells do."""
    parent, program = int(arguments[0]), arguments[1:]
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    # MPICH's proxy tells the living ranks of a dead one by SIGUSR1. A handler, because SIG_IGN
    # would be inherited by the program.
    signal.signal(signal.SIGUSR1, lambda *_: None)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    prctl(PR_SET_PDEATHSIG, KILL_ALL)
    if parent not in (0, os.getppid()):  # it died before prctl was called
        return 1
    try:
        # close_fds=False: a rank speaks PMI over a descriptor that it inherits.
        # One thread, so preexec_fn is safe.
        child = subprocess.Popen(
            program,
            stdout=2,
            close_fds=False,
            preexec_fn=_enter_program,  # noqa: PLW1509
        )
    except OSError as error:
        sys.stderr.write(f"cannot start {program[0]}: {error}\n")
        return 127
    sys.stdout.write(f"pid {child.pid}\n")
    sys.stdout.flush()
    os.close(1)
    code = guard(child.pid)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))
