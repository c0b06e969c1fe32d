# SPDX-License-Identifier: Apache-2.0
"""The distribution's kernel: downloaded and unpacked once into the cache, never installed."""

from __future__ import annotations

import fcntl
import re
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.guest.host import GuestUnavailableError, command
from tests.guest.image import decompress, module_needs, vmlinux

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Debian's name and Ubuntu's. Debian's *cloud* kernel is built without rdma_rxe.
META_PACKAGES = ("linux-image-amd64", "linux-image-generic")

# rdma_rxe asks the crypto layer for "crc32" by name, so no dependency names crc32_generic.
MODULES = (
    "virtio_pci", "9pnet_virtio", "9p", "overlay", "virtio_net", "crc32_generic",
    "ib_uverbs", "rdma_ucm", "rdma_rxe", "dummy", "sch_netem",
)  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """An ELF image to boot, and the modules to load in that order."""

    image: Path
    modules: tuple[Path, ...]


def prepare(cache: Path) -> Kernel:
    """The kernel in the cache; fetches it (70 MB on Debian 12, 10 s) when it is not there."""
    folder = cache / "kernel"
    order = folder / "order"
    wanted = " ".join(MODULES)
    with _locked(cache):
        lines = order.read_text().splitlines() if order.exists() else []
        if lines[:1] != [wanted]:
            lines = [wanted, *_unpack(_download(cache / "packages"), folder)]
            order.write_text("\n".join(lines) + "\n")  # last: it says that the rest is complete
    return Kernel(folder / "vmlinux", tuple(folder / line for line in lines[1:]))


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _download(folder: Path) -> list[Path]:
    """The current kernel's packages; apt does not fetch again what is in the folder."""
    names = _package_names()
    folder.mkdir(exist_ok=True)
    # As root, apt would drop to a user that cannot write here.
    _run("apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", *names, cwd=folder)
    return [
        max(folder.glob(f"{name}_*.deb"), key=lambda file: file.stat().st_ctime) for name in names
    ]


def _package_names() -> list[str]:
    unwanted = ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")
    options = [f"--no-{relation}" for relation in unwanted]
    for meta in META_PACKAGES:
        names = kernel_packages(_run("apt-cache", "depends", "--recurse", *options, meta))
        if names:
            return names
    raise GuestUnavailableError(
        f"apt knows no {' or '.join(META_PACKAGES)} (apt-get update; needs Debian or Ubuntu)"
    )


def kernel_packages(depends: str) -> list[str]:
    """The kernel's own packages in the output of `apt-cache depends --recurse`.

    One on Debian 12; on Ubuntu the image, linux-modules, and linux-modules-extra with rdma_rxe.
    """
    return re.findall(r"^linux-(?:image|modules|modules-extra)-\d\S*$", depends, re.MULTILINE)


def _unpack(packages: list[Path], folder: Path) -> list[str]:
    """Fills the folder with vmlinux and the modules; returns the modules' files in load order."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with tempfile.TemporaryDirectory(dir=folder) as root:
        for package in packages:
            _run("dpkg", "-x", str(package), root)
        image = next(Path(root).glob("boot/vmlinuz-*"), None)
        if image is None:
            raise GuestUnavailableError(f"{packages[0].name} has no boot/vmlinuz-*")
        (folder / "vmlinux").write_bytes(vmlinux(image.read_bytes()))
        modules = _Modules(Path(root))
        names = load_order(MODULES, modules.needs)
        for name in names:
            (folder / f"{name}.ko").write_bytes(modules.read(name))
    return [f"{name}.ko" for name in names]


class _Modules:
    """The modules of an unpacked kernel by name, in which - and _ are the same."""

    def __init__(self, root: Path) -> None:
        self._files = {_module_name(file.name): file for file in root.rglob("*.ko*")}
        lists = root.rglob("modules.builtin")
        self._builtin = {
            _module_name(Path(line).name) for f in lists for line in f.read_text().split()
        }

    def read(self, name: str) -> bytes:
        data = self._files[name].read_bytes()
        return data if data.startswith(b"\x7fELF") else decompress(data)

    def needs(self, name: str) -> list[str] | None:
        """The modules that this one imports from; None if it is built into the kernel."""
        if name in self._files:
            return module_needs(self.read(name))
        if name in self._builtin:
            return None
        raise GuestUnavailableError(f"the kernel has no module {name}")


def _module_name(file: str) -> str:
    return file.split(".")[0].replace("-", "_")


def load_order(wanted: tuple[str, ...], needs: Callable[[str], list[str] | None]) -> list[str]:
    """`wanted` and all that they need, each after what it needs, without what is built in."""
    order: list[str] = []

    def visit(name: str) -> None:
        needed = None if name in order else needs(name)
        if needed is not None:
            for other in needed:
                visit(other)
            order.append(name)

    for name in wanted:
        visit(name)
    return order


def _run(name: str, *arguments: str, cwd: Path | None = None) -> str:
    """A command's output; its failure is the reason that there is no kernel."""
    done = subprocess.run(
        [command(name), *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise GuestUnavailableError(f"{name} {' '.join(arguments)}: exit {done.returncode}: {last}")
    return done.stdout
