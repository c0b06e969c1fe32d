# SPDX-License-Identifier: Apache-2.0
"""The lab is a Slurm of several machines, and what is done to it happens."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.slurm import Lab, why_not
from tests.slurm.machine import poll

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.slurm

SLURMD_PORT = 6818
SILENCE = r"timed out|No route to host"

HETEROGENEOUS = """\
#!/bin/bash
#SBATCH --time=5 --no-requeue --output=%j.out --nodes=1 --constraint=prefill --gres=gpu:4
#SBATCH hetjob
#SBATCH --time=5 --nodes=2 --constraint=decode --gres=gpu:decode:2
srun --label --het-group=0 env ROLE=prefill bash task.sh : --het-group=1 env ROLE=decode bash task.sh
"""
TASK = """\
echo $ROLE $(hostname) $(hostname -i) $CUDA_VISIBLE_DEVICES
"""

COUNT = """\
#!/bin/bash
#SBATCH --time=5 --no-requeue --output=%j.out --nodelist=d1
srun bash -c 'for i in {1..600}; do echo $i; sleep 0.1; done'
"""


def until(condition: Callable[[], object], what: str, timeout_s: float = 30.0) -> None:
    assert poll(condition, timeout_s), what


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def start_count(lab: Lab) -> tuple[int, Path]:
    """A job on d1 that writes a number ten times a second."""
    job = lab.submit(write(lab.shared, "count.sbatch", COUNT))
    output = lab.shared / f"{job}.out"
    until(lambda: output.exists() and "3\n" in output.read_text(), "the job does not start")
    return job, output


def test_heterogeneous_job_runs_on_machines_of_their_own(lab: Lab) -> None:
    write(lab.shared, "task.sh", TASK)
    job = lab.submit(write(lab.shared, "het.sbatch", HETEROGENEOUS))

    assert lab.wait_for(job, "COMPLETED") == {f"{job}+0": "COMPLETED", f"{job}+1": "COMPLETED"}
    output = lab.shared / f"{job}.out"
    assert sorted(output.read_text().splitlines()) == [
        "0: prefill p0 10.77.0.10 0,1,2,3",
        "1: decode d0 10.77.0.12 0,1",
        "2: decode d1 10.77.0.13 0,1",
    ]


def test_tmp_is_the_nodes_own_and_the_rest_is_shared(lab: Lab) -> None:
    lab.check("touch", "/tmp/here", "/dev/shm/here", lab.shared / "here", node="p0")

    assert lab.check("ls", "/tmp/here", "/dev/shm/here", node="p0")
    for path in ("/tmp/here", "/dev/shm/here"):
        assert lab.run("ls", path, node="d0").returncode == 2
        assert not Path(path).exists()
    assert lab.check("ls", lab.shared, node="d0").split().count("here") == 1
    assert lab.check(sys.executable, "-c", "import pytest", node="d0") == ""


def test_crashed_node_loses_its_job_and_boots_again() -> None:
    if reason := why_not():
        pytest.skip(reason)
    with Lab({"p0": "prefill", "d1": "decode"}, settings={"SlurmdTimeout": "5"}) as lab:
        job, output = start_count(lab)
        lab.crash("d1")
        seen = output.read_text()
        with pytest.raises(OSError, match=SILENCE), lab.network():
            socket.create_connection((lab.address("d1"), SLURMD_PORT), timeout=1)
        assert lab.wait_for(job, "NODE_FAIL") == {str(job): "NODE_FAIL"}
        assert output.read_text() == seen

        lab.boot("d1")
        lab.restore()
        assert lab.check("srun", "-w", "d1", "hostname") == "d1\n"


def test_cut_node_is_silent_until_the_network_heals(lab: Lab) -> None:
    _, output = start_count(lab)

    lab.cut("d1")
    with pytest.raises(OSError, match=SILENCE), lab.network():
        socket.create_connection((lab.address("d1"), SLURMD_PORT), timeout=1)
    lab.heal("d1")
    with lab.network("p0"):
        socket.create_connection((lab.address("d1"), SLURMD_PORT), timeout=10).close()

    seen = output.read_text()
    until(lambda: output.read_text() != seen, "the job does not go on")


def test_tasks_outlive_slurmd(lab: Lab) -> None:
    job, output = start_count(lab)

    lab.stop_slurmd("d1")
    seen = output.read_text()
    until(lambda: output.read_text() != seen, "the job does not go on")
    lab.start_slurmd("d1")

    assert lab.states(job) == {str(job): "RUNNING"}


def test_two_labs_at_once_and_one_has_accounting(lab: Lab, accounting_lab: Lab) -> None:
    assert "disabled" in lab.run("sacct").stderr
    job = accounting_lab.submit("--wrap", "srun false", "--output=/dev/null")
    accounting_lab.wait_for(job, "FAILED")

    def state() -> str:
        return accounting_lab.check("sacct", "-nXP", f"--jobs={job}", "--format=State,ExitCode")

    until(lambda: state() == "FAILED|1:0\n", "accounting does not say FAILED")
    assert accounting_lab.folder != lab.folder


def test_settings_replace_those_of_the_lab() -> None:
    if reason := why_not():
        pytest.skip(reason)
    features = {"a0": "decode", "z0": "prefill"}
    with Lab(features, settings={"KillWait": "77", "MpiDefault": "pmi2"}) as lab:
        shown = lab.check("scontrol", "show", "config")
        assert "KillWait                = 77 sec" in shown
        assert "MpiDefault              = pmi2" in shown
        nodes = lab.check("sinfo", "-hN", "-o", "%N %f")
    assert nodes.split() == ["a0", "decode", "z0", "prefill"]
    assert not lab.folder.exists()


def test_partition_of_higher_priority_preempts() -> None:
    if reason := why_not():
        pytest.skip(reason)
    settings = {"PreemptType": "preempt/partition_prio", "PreemptMode": "CANCEL"}
    # Without GraceTime: a job that ends in its grace has the state by its exit code.
    partitions = ["low Default=YES PriorityTier=1", "high PriorityTier=2"]
    with Lab({"d1": "decode"}, settings=settings, partitions=partitions) as lab:
        preempted, _ = start_count(lab)
        job = lab.submit("--partition=high", "--exclusive", "--output=/dev/null", "--wrap", "true")
        assert lab.wait_for(preempted, "PREEMPTED")
        assert lab.wait_for(job, "COMPLETED")


def test_lab_ends_with_its_process_and_obeys_orders() -> None:
    if reason := why_not():
        pytest.skip(reason)
    command = ["bash", "-c", 'echo cut d0 >> "$SLURM_LAB/orders"; echo "$SLURM_LAB"; sleep 300']
    argv = [sys.executable, "-m", "tests.slurm", "-n", "p0,d0", "--", *command]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        assert (folder / "orders").exists()
        machine = int((folder / "d0" / "pid").read_text())
        until(lambda: "state DOWN" in link_of(folder, "v-d0"), "d0 was not cut off")
        process.send_signal(signal.SIGKILL)

    until(lambda: not folder.exists(), f"{folder} stays")
    with pytest.raises(ProcessLookupError):
        os.kill(machine, 0)


def link_of(folder: Path, name: str) -> str:
    """What the controller of another process's lab says of its end of a cable."""
    controller = (folder / "ctl" / "pid").read_text().strip()
    return subprocess.run(
        ["nsenter", "-t", controller, "-n", "ip", "link", "show", name],
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_what_a_lab_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.slurm.host.SEARCH_PATH", "/nowhere")
    why_not.cache_clear()
    try:
        reason = why_not()
    finally:
        why_not.cache_clear()
    assert reason is not None
    assert reason.startswith(("a Slurm lab needs root", "no ip, munged")), reason
