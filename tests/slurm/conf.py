# SPDX-License-Identifier: Apache-2.0
"""The texts of a lab's configuration files; pure functions."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

CONTROLLER = "ctl"
CONTROLLER_ADDRESS = "10.77.0.1"
FIRST_HOST = 10
CPUS = 4
GPUS = 4
MEMORY_MIB = 4000
PARTITION = "main Default=YES MaxTime=INFINITE"

# In each node's own /tmp.
MUNGE_SOCKET = "/tmp/munge.socket"


@dataclass(frozen=True)
class Node:
    """A machine of the lab. One without a feature is the controller."""

    name: str
    address: str
    feature: str = ""

    @property
    def mac(self) -> str:
        """Stays over reboots, else the others would go on sending to the old one for a while."""
        return "02:00:" + ":".join(f"{int(part):02x}" for part in self.address.split("."))


def machines(features: Mapping[str, str]) -> dict[str, Node]:
    """The controller and the nodes, by name."""
    controller = Node(CONTROLLER, CONTROLLER_ADDRESS)
    nodes = [
        Node(name, f"10.77.0.{FIRST_HOST + index}", feature)
        for index, (name, feature) in enumerate(features.items())
    ]
    return {node.name: node for node in [controller, *nodes]}


def hosts(nodes: Iterable[Node]) -> str:
    """/etc/hosts of all of them."""
    return "127.0.0.1 localhost\n" + "".join(f"{node.address} {node.name}\n" for node in nodes)


def slurm_conf(
    folder: Path, nodes: Iterable[Node], settings: Mapping[str, str], partitions: Iterable[str]
) -> str:
    """slurm.conf; `settings` win over the lab's own."""
    lines = [f"{key}={value}" for key, value in {**_defaults(folder), **settings}.items() if value]
    lines += [
        f"NodeName={node.name} NodeAddr={node.address} CPUs={CPUS} RealMemory={MEMORY_MIB} "
        f"Feature={node.feature} Gres=gpu:{node.feature}:{GPUS}"
        for node in nodes
        if node.feature
    ]
    lines += [f"PartitionName={partition} Nodes=ALL State=UP" for partition in partitions]
    return "\n".join(lines) + "\n"


def gres_conf(folder: Path, nodes: Iterable[Node]) -> str:
    """gres.conf: the GPUs are character devices, for Slurm takes no mere count."""
    lines = ["AutoDetect=off"]
    lines += [
        f"NodeName={node.name} Name=gpu Type={node.feature} File={folder}/dev/gpu[0-{GPUS - 1}]"
        for node in nodes
        if node.feature
    ]
    return "\n".join(lines) + "\n"


def slurmdbd_conf(folder: Path) -> str:
    """slurmdbd.conf: a database behind a Unix socket, and no passwords."""
    return f"""\
AuthType=auth/munge
AuthInfo=socket={MUNGE_SOCKET}
DbdHost={CONTROLLER}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct
LogFile={folder}/{CONTROLLER}/slurmdbd.log
PidFile={folder}/{CONTROLLER}/slurmdbd.pid
"""


ACCOUNTING_SETTINGS = {
    "AccountingStorageType": "accounting_storage/slurmdbd",
    "AccountingStorageHost": CONTROLLER,
    "AccountingStoragePass": MUNGE_SOCKET,  # in place of AuthInfo
    "AccountingStorageTRES": "gres/gpu",
    "JobAcctGatherFrequency": "5",
}


def _defaults(folder: Path) -> dict[str, str]:
    return {
        "ClusterName": "lab",
        "SlurmctldHost": f"{CONTROLLER}({CONTROLLER_ADDRESS})",
        "SlurmUser": "root",
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={MUNGE_SOCKET}",
        "StateSaveLocation": f"{folder}/state",
        "SlurmdSpoolDir": f"{folder}/%n/spool",
        "SlurmctldPidFile": f"{folder}/{CONTROLLER}/slurmctld.pid",
        "SlurmdPidFile": f"{folder}/%n/slurmd.pid",
        "SlurmctldLogFile": f"{folder}/{CONTROLLER}/slurmctld.log",
        "SlurmdLogFile": f"{folder}/%n/slurmd.log",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/linux",
        "MpiDefault": "none",
        # Heterogeneous jobs are started by the backfill scheduler alone: every 30 s by default.
        "SchedulerParameters": "bf_interval=1",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        "GresTypes": "gpu",
        "ReturnToService": "2",
        # Nodes may have more CPUs and memory than this machine.
        "SlurmdParameters": "config_overrides",
        "SlurmdTimeout": "15",
        "KillWait": "10",
        "MinJobAge": "3600",
        # Two labs' jobs have different numbers, whose results may lie in one folder.
        "FirstJobId": str(int(time.time()) % 900_000 + 1000),
    }
