# SPDX-License-Identifier: Apache-2.0
"""The parts of the guests that need no guest."""

from __future__ import annotations

import gzip
import io
import lzma
import shutil
import stat
import struct
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.guest.__main__ import Printer, parser
from tests.guest.folder import RunFolder, exports, forwarded
from tests.guest.host import GuestUnavailableError, cache_folder, command
from tests.guest.image import decompress, module_needs, vmlinux
from tests.guest.initramfs import archive
from tests.guest.kernel import kernel_packages, load_order
from tests.guest.machine import Boot, Spec, mac, qemu_arguments, switch_arguments
from tests.guest.result import GuestRun
from tests.guest.run import Guests, default_smp
from tests.guest.uml import first_cpu, uml_arguments

if TYPE_CHECKING:
    from collections.abc import Callable

BOOT = Boot(Path("/cache/vmlinux"), Path("/run,1/initramfs.cpio"), Path("/run,1"), tsc_khz=2500000)

DEBIAN = """\
linux-image-amd64
  Depends: linux-image-6.1.0-56-amd64
linux-image-6.1.0-56-amd64
  Depends: linux-base
linux-base
"""
UBUNTU = """\
linux-image-generic
  Depends: linux-image-6.8.0-88-generic
  Depends: linux-modules-extra-6.8.0-88-generic
  Depends: linux-firmware
linux-image-6.8.0-88-generic
 |Depends: kmod
  Depends: linux-modules-6.8.0-88-generic
linux-modules-extra-6.8.0-88-generic
linux-firmware
linux-modules-6.8.0-88-generic
"""


def value(arguments: list[str], option: str) -> str:
    """The value of an option given once."""
    assert arguments.count(option) == 1
    return arguments[arguments.index(option) + 1]


def values(arguments: list[str], option: str) -> list[str]:
    """The values of an option."""
    return [after for before, after in pairwise(arguments) if before == option]


def test_single_guest_has_no_cable() -> None:
    arguments = qemu_arguments(Spec(memory_mib=512, smp=2), BOOT, 0, monitor_fd=7, cable_fds=[])

    assert value(arguments, "-smp") == "2"
    assert value(arguments, "-m") == "512"
    assert value(arguments, "-kernel") == "/cache/vmlinux"
    assert value(arguments, "-chardev") == "socket,id=qmp,fd=7"
    assert value(arguments, "-accel").startswith("tcg,")
    assert value(arguments, "-append").endswith("tsc_early_khz=2500000 GUEST_NODE=0")
    assert "-netdev" not in arguments
    host, run = values(arguments, "-virtfs")
    assert "path=/," in host
    assert "readonly=on" in host
    assert "path=/run,,1," in run


def test_each_rail_is_a_cable_and_a_card() -> None:
    arguments = qemu_arguments(Spec(nodes=2, rails=2), BOOT, 1, monitor_fd=7, cable_fds=[8, 9])

    assert values(arguments, "-netdev") == [
        "dgram,id=rail0,local.type=fd,local.str=8",
        "dgram,id=rail1,local.type=fd,local.str=9",
    ]
    first, second = values(arguments, "-device")
    assert first.startswith("virtio-net-pci,netdev=rail0,mac=52:54:00:77:00:02,host_mtu=4400,")
    assert second.startswith("virtio-net-pci,netdev=rail1,mac=52:54:00:78:00:02,host_mtu=4400,")
    assert "GUEST_NODE=1" in value(arguments, "-append")


def test_switch_has_a_hub_a_rail() -> None:
    arguments = switch_arguments([[3, 4, 5], [6, 7, 8]])

    assert value(arguments, "-machine") == "none"
    hubs = [text for text in values(arguments, "-netdev") if text.startswith("hubport,")]
    assert hubs == [
        f"hubport,id=hub{fd},hubid={rail},netdev=port{fd}"
        for rail, fds in enumerate([[3, 4, 5], [6, 7, 8]])
        for fd in fds
    ]


def test_mac_addresses_differ() -> None:
    assert len({mac(node, rail) for node in range(20) for rail in range(20)}) == 400


def test_uml_arguments_end_with_the_init_program() -> None:
    arguments = uml_arguments(Spec(nodes=2, rails=2), Path("/run"), 1, [8, 9])

    assert "vec1:transport=fd,fd=9,mac=52:54:00:78:00:02,mtu=4400" in arguments
    assert {"GUEST_NODE=1", "GUEST_IO=/run", "mem=1024M"} < set(arguments)
    assert arguments[-3:-1] == ["init=/bin/bash", "--"]
    assert arguments[-1].endswith("uml_init.sh")


def test_first_cpu_has_one_rate() -> None:
    text = "processor\t: 0\ncpu MHz\t\t: 1.5\ncores\t: 2\n\nprocessor\t: 1\ncpu MHz\t\t: 1.5\n\n"

    assert first_cpu(text, 2_500_000) == "processor\t: 0\ncores\t: 2\ncpu MHz\t\t: 2500.000\n\n"


def test_modules_load_after_what_they_need_and_without_what_is_built_in() -> None:
    needs = {"rxe": ["uverbs", "udp"], "uverbs": ["core"], "udp": ["virtio"], "core": [], "9p": []}

    order = load_order(("rxe", "9p", "uverbs"), lambda name: needs.get(name))

    assert order == ["core", "uverbs", "udp", "rxe", "9p"]


def test_module_names_what_it_needs() -> None:
    assert module_needs(b"\x7fELF\0license=GPL\0depends=ib-core,udp_tunnel\0retpoline=Y\0") == [
        "ib_core",
        "udp_tunnel",
    ]
    assert module_needs(b"\x7fELF\0depends=\0") == []


@pytest.mark.parametrize(
    ("depends", "packages"),
    [
        (DEBIAN, ["linux-image-6.1.0-56-amd64"]),
        (
            UBUNTU,
            [
                "linux-image-6.8.0-88-generic",
                "linux-modules-extra-6.8.0-88-generic",
                "linux-modules-6.8.0-88-generic",
            ],
        ),
        ("", []),
    ],
)
def test_kernel_packages(depends: str, packages: list[str]) -> None:
    assert kernel_packages(depends) == packages


def zstd(data: bytes) -> bytes:
    """A zstd stream."""
    if shutil.which("zstd") is None:
        pytest.skip("no zstd")
    return subprocess.run(["zstd", "-qc"], input=data, capture_output=True, check=True).stdout


@pytest.mark.parametrize("compress", [lzma.compress, gzip.compress, zstd])
def test_elf_comes_out_of_a_bzimage(compress: Callable[[bytes], bytes]) -> None:
    elf = b"\x7fELF" + bytes(range(256)) * 50
    payload = compress(elf) + struct.pack("<I", len(elf))
    setup_sectors, before = 3, 40
    image = bytearray((setup_sectors + 1) * 512 + before) + payload + b"behind it"
    image[0x1F1] = setup_sectors
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", image, 0x248, before, len(payload))

    assert vmlinux(bytes(image)) == elf


def test_unknown_kernel_formats_are_named() -> None:
    with pytest.raises(GuestUnavailableError, match="no bzImage"):
        vmlinux(b"\x7fELF" + bytes(1000))
    with pytest.raises(GuestUnavailableError, match="02214c18"):
        decompress(b"\x02\x21\x4c\x18lz4")


def test_archive_is_what_cpio_reads(tmp_path: Path) -> None:
    busybox = command("busybox")
    data = archive(
        [
            ("bin", stat.S_IFDIR | 0o755, b""),
            ("bin/a", stat.S_IFREG | 0o755, b"12345"),
            ("b", stat.S_IFREG | 0o644, b""),
        ]
    )
    subprocess.run([busybox, "cpio", "-id"], input=data, cwd=tmp_path, check=True)

    assert (tmp_path / "bin/a").read_bytes() == b"12345"
    assert (tmp_path / "bin/a").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "b").read_bytes() == b""


def test_environment_survives_the_shell() -> None:
    nasty = 'a\'b "c" $HOME `id` \\ \n#'
    script = exports({"NASTY": nasty}) + 'printf %s "$NASTY"'

    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)

    assert done.stdout == nasty


def test_only_harmless_variables_reach_the_guests() -> None:
    host = {"PATH": "/bin", "PYTHONPATH": "x", "AWS_SECRET": "s", "BASH_FUNC_f%%": "() { :; }"}

    assert forwarded(host) == {"PATH": "/bin", "PYTHONPATH": "x"}


def test_folder_of_an_earlier_run_is_replaced_but_no_other(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.fill(Spec(nodes=2), "first", {})
    folder.output(1).write_text("old")
    folder.fill(Spec(nodes=2), "second", {})
    assert folder.read_output(1) == ""
    assert (folder.path / "command.sh").read_text() == "second\n"

    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match="other"):
        RunFolder(other).fill(Spec(), "true", {})
    assert (other / "thesis.txt").exists()


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GUEST_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/rdma-kv-cache/guest")
    monkeypatch.setenv("GUEST_CACHE", "/given")
    assert cache_folder() == Path("/given")


@pytest.mark.parametrize(
    ("rc", "killed", "exit_code"),
    [
        ((0, 0), set(), 0),
        ((0, 3), set(), 3),
        ((0, 125), set(), 125),
        ((0, 125), {1}, 0),
        ((4, 125), {1}, 4),
        ((0, 3), {1}, 3),
        ((124, 125), {1}, 124),
        ((125,), {0}, 125),
    ],
)
def test_exit_code_of_a_run(rc: tuple[int, ...], killed: set[int], exit_code: int) -> None:
    texts = ("",) * len(rc)
    run = GuestRun(rc, texts, texts, (None,) * len(rc), frozenset(killed), 1.0)

    assert run.exit_code == exit_code


@pytest.mark.parametrize(
    "line", ["kil 1", "kill", "kill one", "kill 2", "link 0 of", "link 0 off 1"]
)
def test_bad_control_lines_are_refused(line: str) -> None:
    guests = Guests("true", nodes=2)

    with pytest.raises(ValueError, match=r"'one'|no node|no cable|cannot read"):
        guests.obey(line)


def test_single_guest_has_two_cpus_where_the_host_has() -> None:
    assert default_smp(1, uml=False) in (1, 2)
    assert default_smp(2, uml=False) == 1
    assert default_smp(1, uml=True) == 1


def test_command_line() -> None:
    options = parser().parse_args(["-n", "2", "-t", "9.5", "--", "ib_write_bw", "-d", "rxe0"])

    assert options.nodes == 2
    assert options.timeout_s == 9.5
    assert options.command == ["ib_write_bw", "-d", "rxe0"]


def test_output_is_printed_in_whole_lines(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    files = [io.BytesIO(b"a\nb"), io.BytesIO(b"")]
    printer = Printer(files)
    printer.copy()
    assert capfdbinary.readouterr().out == b"[0] a\n"
    files[0] = io.BytesIO(b"c\xff\n")
    printer.copy()
    assert capfdbinary.readouterr().out == b"[0] bc\xff\n"
    files[1] = io.BytesIO(b"no end")
    printer.copy(last=True)
    assert capfdbinary.readouterr().out == b"[1] no end\n"
