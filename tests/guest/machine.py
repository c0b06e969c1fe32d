# SPDX-License-Identifier: Apache-2.0
"""The QEMU command lines of the guests; pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

FIRST_NET = 77
MTU = 4400  # boot.sh says why
CARD = f"host_mtu={MTU},speed=10000,duplex=full,romfile="

# Without the tests, clearing and hardening that a throw-away guest would only wait for. boot.sh
# starts the other CPUs: booting with two takes 7.1 CPU seconds, with one 4.3. With tsc_early_khz
# the guest does not measure its clock: on a loaded host it was off by a factor of 2.
KERNEL_ARGUMENTS = (
    "console=ttyS0", "quiet", "panic=-1", "oops=panic", "mitigations=off", "init_on_alloc=0",
    "nokaslr", "rodata=off", "no_timer_check", "audit=0", "random.trust_cpu=on",
    "cryptomgr.notests", "rcupdate.rcu_expedited=1", "maxcpus=1", "tsc=reliable",
)  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """What a run consists of."""

    nodes: int = 1
    rails: int = 1
    memory_mib: int = 1024
    smp: int = 1


@dataclass(frozen=True)
class Boot:
    """What the guests boot."""

    image: Path
    initramfs: Path
    folder: Path  # /io in the guests
    tsc_khz: int


def mac(node: int, rail: int) -> str:
    """The MAC address of a node's eth<rail>."""
    return f"52:54:00:{FIRST_NET + rail}:00:{node + 1:02x}"


def qemu_arguments(
    spec: Spec, boot: Boot, node: int, monitor_fd: int, cable_fds: Sequence[int]
) -> list[str]:
    """Arguments of node's QEMU; it inherits a socket for QMP and one a rail for its frames."""
    kernel = [*KERNEL_ARGUMENTS, f"tsc_early_khz={boot.tsc_khz}", f"GUEST_NODE={node}"]
    share = "security_model=none"
    arguments = [
        # /dev/kvm is no proof of KVM inside virtual machines, where QEMU then aborts or hangs.
        "-accel", "tcg,thread=multi,tb-size=256", "-cpu", "max,la57=off", "-machine", "pc",
        "-smp", str(spec.smp), "-m", str(spec.memory_mib),
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio",
        "-chardev", f"socket,id=qmp,fd={monitor_fd}", "-mon", "chardev=qmp,mode=control",
        "-kernel", str(boot.image), "-initrd", str(boot.initramfs), "-append", " ".join(kernel),
        "-virtfs", f"local,path=/,mount_tag=host,readonly=on,multidevs=remap,{share}",
        "-virtfs", f"local,path={_escaped(boot.folder)},mount_tag=io,{share}",
    ]  # fmt: skip
    for rail, fd in enumerate(cable_fds):
        arguments += [
            "-netdev", f"dgram,id=rail{rail},local.type=fd,local.str={fd}",
            "-device", f"virtio-net-pci,netdev=rail{rail},mac={mac(node, rail)},{CARD}",
        ]  # fmt: skip
    return arguments


def switch_arguments(port_fds: Sequence[Sequence[int]]) -> list[str]:
    """Arguments of a QEMU without a machine that joins three or more nodes: sockets by rail."""
    arguments = ["-machine", "none", "-nodefaults", "-no-user-config", "-display", "none"]
    for rail, fds in enumerate(port_fds):
        for fd in fds:
            arguments += [
                "-netdev", f"dgram,id=port{fd},local.type=fd,local.str={fd}",
                "-netdev", f"hubport,id=hub{fd},hubid={rail},netdev=port{fd}",
            ]  # fmt: skip
    return arguments


def _escaped(path: Path) -> str:
    """A path as a value in a QEMU option, where a comma is doubled."""
    return str(path).replace(",", ",,")
