# SPDX-License-Identifier: Apache-2.0
"""`rdma-kv doctor`: what this machine has, what it lacks, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import resource
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import click

INFINIBAND = Path("/sys/class/infiniband")
EXIT_NO_BACKEND = 1


@dataclass(frozen=True)
class Check:
    """One line of the report. `ok` is None for what is only good to know."""

    name: str
    ok: bool | None
    detail: str


@click.command(short_help="Say what this machine has and what it lacks.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of lines.")
def doctor(as_json: bool) -> None:
    """Report Python, vLLM, MPI launcher, usable backends, memlock limit and RDMA devices.

    Exit code: 0 if at least one backend can be used here, 1 if none.

    \b
    Example:
      rdma-kv doctor
      rdma-kv doctor --json | jq '.checks[] | select(.ok == false)'
    """
    backends = check_backends()
    checks = [
        check_python(),
        check_vllm(),
        check_mpi(),
        *backends,
        check_memlock(),
        *check_devices(INFINIBAND),
    ]
    usable = any(check.ok for check in backends)
    if as_json:
        content = {"usable": usable, "checks": [asdict(check) for check in checks]}
        click.echo(json.dumps(content, indent=2))
    else:
        for check in checks:
            mark = {True: "ok", False: "no", None: "--"}[check.ok]
            click.echo(f"{mark}  {check.name:<18} {check.detail}")
        if not usable:
            click.echo("No backend is usable here; the lines marked no say why.", err=True)
    raise SystemExit(0 if usable else EXIT_NO_BACKEND)


def check_python() -> Check:
    """Which Python this is, and where."""
    return Check("python", True, f"{platform.python_version()} ({sys.executable})")


def check_vllm() -> Check:
    """Whether a vLLM distribution is installed here; it is not imported."""
    names = importlib.metadata.packages_distributions().get("vllm", [])
    if not names:
        return Check("vllm", False, "not installed in this environment: pip install vllm")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in dict.fromkeys(names)]
    return Check("vllm", True, ", ".join(versions))


def check_mpi() -> Check:
    """Where the MPI launcher is: that of this environment first, as `serve` and `batch` do."""
    beside = Path(sys.executable).parent / "mpiexec"
    found = str(beside) if beside.is_file() else shutil.which("mpiexec") or shutil.which("srun")
    if found:
        return Check("mpi launcher", True, found)
    return Check("mpi launcher", False, "neither mpiexec nor srun: pip install mpich")


def check_backends() -> list[Check]:
    """Ask the native extension which backends work here."""
    try:
        from rdma_kv_cache import _native
    except ImportError as error:
        return [
            Check("native extension", False, f"{error}; build it: pip install -e . (or make build)")
        ]
    return [
        Check(f"backend {info.name}", info.usable, info.reason or "usable")
        for info in _native.probe_backends()
    ]


def check_memlock() -> Check:
    """Whether registering KV memory can fail for want of locked memory."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Check("memlock limit", True, "unlimited")
    return Check(
        "memlock limit",
        None,
        f"{soft >> 10} KiB; verbs needs it unlimited (ulimit -l unlimited, or LimitMEMLOCK)",
    )


def check_devices(root: Path) -> list[Check]:
    """List the RDMA devices' ports under `root` (/sys/class/infiniband)."""
    ports = sorted(root.glob("*/ports/*"))
    if not ports:
        return [Check("rdma devices", None, f"none in {root}")]
    checks = []
    for port in ports:
        state = _read(port / "state")
        detail = f"{state}, {_read(port / 'link_layer')}, {_read(port / 'rate')}"
        name = f"{port.parent.parent.name} port {port.name}"
        checks.append(Check(name, "ACTIVE" in state, detail))
    return checks


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError as error:
        return f"{path.name} unreadable ({error.strerror})"
