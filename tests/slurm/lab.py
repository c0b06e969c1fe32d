# SPDX-License-Identifier: Apache-2.0
"""The lab: starts the machines and Slurm's daemons, and does to them what tests ask for."""

from __future__ import annotations

import os
import shlex
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.slurm import conf, namespaces
from tests.slurm.accounting import start_accounting
from tests.slurm.host import SEARCH_PATH, check
from tests.slurm.keeper import Keeper
from tests.slurm.machine import LabError, Machine, poll

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

# Names that sort against the order of the components: Slurm's node map of a step over several
# components is wrong then, which friendlier names would hide.
NODES = ("p0", "p1", "d0", "d1")
REPOSITORY = Path(__file__).parents[2]
# Not /tmp, of which every machine has its own; a short path, for sockets lie below.
BASE = Path("/var/tmp")
START_TIMEOUT_S = 30.0
COMMAND_TIMEOUT_S = 60.0
# A node that was cut off or set down answers the next ping of the controller at the latest.
RETURN_TIMEOUT_S = 60.0
# States of jobs that have not ended.
ALIVE = frozenset(
    {"PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING", "REQUEUED", "STOPPED"}
)
ORDERS = ("crash", "boot", "cut", "heal", "stop_slurmd", "start_slurmd")

__all__ = ["NODES", "Lab", "LabError", "feature_of"]


def feature_of(name: str) -> str:
    """The feature of a node by its name."""
    return "prefill" if name.startswith("p") else "decode"


class Lab:
    """A Slurm of several nodes, as a context manager.

    It ends with the process that started it, whatever that dies of, and leaves no file, process
    or network device. Several can run at once.
    """

    def __init__(
        self,
        nodes: Mapping[str, str] | None = None,
        *,
        accounting: bool = False,
        settings: Mapping[str, str] | None = None,
        partitions: Sequence[str] = (conf.PARTITION,),
    ) -> None:
        """`nodes`: feature by name. `settings`: of slurm.conf; "" removes one of the lab's own.

        `partitions`: names with their options, e.g. "high PriorityTier=2"; all have all nodes.
        """
        features = dict(nodes or {name: feature_of(name) for name in NODES})
        self.nodes = tuple(features)
        self._specs = conf.machines(features)
        self._accounting = accounting
        self._partitions = tuple(partitions)
        self._settings = {**(conf.ACCOUNTING_SETTINGS if accounting else {}), **(settings or {})}
        self._machines: dict[str, Machine] = {}

    def __enter__(self) -> Lab:
        check(accounting=self._accounting)
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-lab.", dir=BASE))
        with ExitStack() as undo:
            self._keeper = undo.enter_context(Keeper(self.folder))
            self._configure()
            self._start()
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    @property
    def shared(self) -> Path:
        """A folder that all nodes see, for scripts and results of tests."""
        return self.folder / "shared"

    @property
    def env(self) -> dict[str, str]:
        """The environment of commands: this process's own with the lab's Slurm."""
        kept = {key: text for key, text in os.environ.items() if not key.startswith("SLURM")}
        own = {
            "PATH": SEARCH_PATH,
            "SLURM_CONF": str(self.folder / "etc" / "slurm.conf"),
            "SLURM_LAB": str(self.folder),
        }
        return {**kept, **own}

    def address(self, node: str) -> str:
        """The node's IP address."""
        return self._specs[node].address

    # Commands

    def popen(
        self,
        *command: str | Path,
        node: str = conf.CONTROLLER,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> subprocess.Popen[str]:
        """Starts a command on a node, by default on the controller and in `shared`.

        It is killed when the process returned is. The options are those of subprocess.Popen.
        """
        inside = namespaces.enter(self._machines[node].pid, cwd or self.shared)
        argv = [*inside, *map(str, command)]
        return subprocess.Popen(argv, env={**self.env, **(env or {})}, text=True, **options)

    def run(
        self,
        *command: str | Path,
        node: str = conf.CONTROLLER,
        timeout_s: float = COMMAND_TIMEOUT_S,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on a node to its end. Raises subprocess.TimeoutExpired."""
        with self.popen(
            *command,
            node=node,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            try:
                out, err = process.communicate(timeout=timeout_s)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def check(self, *command: str | Path, **options: Any) -> str:
        """Runs a command and returns what it wrote. Raises LabError if it fails."""
        done = self.run(*command, **options)
        if done.returncode != 0:
            text = shlex.join(map(str, command))
            said = done.stdout + done.stderr
            raise LabError(f"{text}: exit code {done.returncode}\n{said}")
        return done.stdout

    @contextmanager
    def network(self, node: str = conf.CONTROLLER) -> Iterator[None]:
        """Sockets that this thread makes meanwhile are in the node's network."""
        with namespaces.network_of(self._machines[node].pid):
            yield

    # Jobs

    def submit(self, *arguments: str | Path, **options: Any) -> int:
        """sbatch; returns the job's number (the leader's of a heterogeneous job)."""
        return int(self.check("sbatch", "--parsable", *arguments, **options).split(";")[0])

    def states(self, job: int) -> dict[str, str]:
        """States of the job's components, by their numbers as Slurm writes them: 7, or 7+0, 7+1."""
        lines = self.check(
            "squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%i %T"
        )
        return dict(line.split() for line in lines.splitlines())

    def wait_for(self, job: int, *wanted: str, timeout_s: float = 60.0) -> dict[str, str]:
        """Returns the states when all components have one of those.

        Raises LabError if that comes to nothing: too late, or the job has ended otherwise.
        """
        deadline = time.monotonic() + timeout_s
        # Not sbatch --wait, whose looks at the job are up to half a minute apart.
        while not (states := self.states(job)) or not set(states.values()) <= set(wanted):
            if time.monotonic() > deadline or (states and ALIVE.isdisjoint(states.values())):
                detail = self.run("scontrol", "show", "job", str(job)).stdout
                raise LabError(f"job {job} is {states}, not {wanted}\n{detail}")
            time.sleep(0.1)
        return states

    # Faults

    def crash(self, node: str) -> None:
        """Cuts the node's power."""
        self.cut(node)  # else the kernel would close connections of the killed with a FIN
        self._machines[node].crash()

    def boot(self, node: str) -> None:
        """Starts a node that has crashed."""
        if node in self._machines and self._machines[node].is_up():
            raise LabError(f"{node} is up")
        machine = Machine(self._specs[node], self.folder, self._keeper.pid, shared_folders(self))
        machine.start(self.env, self._wire)
        self._machines[node] = machine
        self.start_slurmd(node)

    def cut(self, node: str) -> None:
        """Pulls the node's network cable."""
        self._switch("link", "set", f"v-{node}", "down")

    def heal(self, node: str) -> None:
        """Plugs it in again."""
        self._switch("link", "set", f"v-{node}", "up")

    def stop_slurmd(self, node: str) -> None:
        """Kills the node's slurmd; its tasks live on."""
        pid_file = self.folder / node / "slurmd.pid"
        self.check("kill", "-KILL", pid_file.read_text().strip(), node=node)
        pid_file.unlink()

    def start_slurmd(self, node: str) -> None:
        """Starts the node's slurmd."""
        try:
            self.check("slurmd", node=node)
        except LabError as error:  # which says nothing: it has told its log
            raise LabError(f"{node}: {error}{self.log(node)[-2000:]}") from error

    def obey(self, line: str) -> None:
        """Does what a line says: ORDER NODE. Raises ValueError if it cannot be read."""
        match line.split():
            case [order, node] if order in ORDERS and node in self.nodes:
                getattr(self, order)(node)
            case _:
                raise ValueError(f"cannot read {line!r}")

    def restore(self) -> None:
        """Ends all jobs and brings back all nodes, so that the next test finds a fresh lab."""
        self.check("scancel", "--signal=KILL", "--user=root")
        self.check("scancel", "--user=root")
        for node in self.nodes:
            if not self._machines[node].is_up():
                self.boot(node)
            self.heal(node)
            if not (self.folder / node / "slurmd.pid").exists():
                self.start_slurmd(node)
        self._wait_idle(RETURN_TIMEOUT_S)

    def log(self, node: str = conf.CONTROLLER) -> str:
        """What the node's daemon has logged."""
        name = "slurmctld.log" if node == conf.CONTROLLER else "slurmd.log"
        return (self.folder / node / name).read_text(errors="replace")

    # Start

    def _configure(self) -> None:
        self.folder.chmod(0o755)
        etc = self.folder / "etc"
        spools = [f"{node}/spool" for node in self.nodes]
        for name in ("etc", "state", "dev", "shared", *spools):
            (self.folder / name).mkdir(parents=True)
        self.shared.chmod(0o1777)
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        for index in range(conf.GPUS):
            device = self.folder / "dev" / f"gpu{index}"
            # A number for local use: no driver answers to it.
            os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(240, index))
        specs = self._specs.values()
        (self.folder / "hosts").write_text(conf.hosts(specs))
        (etc / "slurm.conf").write_text(
            conf.slurm_conf(self.folder, specs, self._settings, self._partitions)
        )
        (etc / "gres.conf").write_text(conf.gres_conf(self.folder, specs))

    def _start(self) -> None:
        controller = Machine(
            self._specs[conf.CONTROLLER], self.folder, self._keeper.pid, shared_folders(self)
        )
        controller.start(self.env)
        self._machines[conf.CONTROLLER] = controller
        if self._accounting:
            start_accounting(self)
        self.check("slurmctld", "-i")  # there is no state yet to go on from
        for node in self.nodes:
            self.boot(node)
        self._wait_idle(START_TIMEOUT_S)

    def _wire(self, machine: Machine) -> None:
        """Connects a machine to the controller's bridge, where a crashed one may still hang."""
        name = f"v-{machine.node.name}"
        self._switch("link", "delete", name, must_succeed=False)
        peer = ["peer", "name", "eth0", "address", machine.node.mac, "netns", str(machine.pid)]
        self._switch("link", "add", name, "type", "veth", *peer)
        self._switch("link", "set", name, "master", "eth0", "up")

    def _switch(self, *arguments: str, must_succeed: bool = True) -> None:
        inside = namespaces.enter_network(self._machines[conf.CONTROLLER].pid)
        argv = [*inside, "ip", *arguments]
        done = subprocess.run(argv, env=self.env, capture_output=True, text=True, check=False)
        if must_succeed and done.returncode != 0:
            raise LabError(f"ip {shlex.join(arguments)}: {done.stderr.strip()}")

    def _wait_idle(self, timeout_s: float) -> None:
        def idle() -> bool:
            done = self.run("sinfo", "--noheader", "--Node", "--states=idle", "--format=%N")
            busy = self.run("sinfo", "--noheader", "--Node", "--responding", "--format=%N")
            ready = set(done.stdout.split()) & set(busy.stdout.split())
            return ready == set(self.nodes)

        if not poll(idle, timeout_s):
            nodes = self.run("sinfo", "--Node", "--format=%N %T %E").stdout
            raise LabError(f"not all nodes are idle:\n{nodes}{self.log()[-2000:]}")


def shared_folders(lab: Lab) -> list[Path]:
    """What all machines see, also where it lies in /tmp."""
    return [lab.folder, REPOSITORY, Path(sys.prefix), Path(sys.base_prefix)]
