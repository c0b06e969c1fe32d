#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the User-Mode Linux kernel of the guests from the distribution's kernel source: one file
# of 8 MB with rdma_rxe inside, in GUEST_CACHE/uml. Takes 6 minutes on two cores, 1.5 GB meanwhile.
set -euo pipefail

CACHE=${GUEST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/rdma-kv-cache/guest}/uml
JOBS=${JOBS:-$(nproc)}
HERE=$(cd "$(dirname "$0")" && pwd)

# rdma_rxe depends on PCI and INFINIBAND. VIRTIO_UML and UML_PCI_OVER_VIRTIO bring PCI, HAS_IOMEM
# and HAS_DMA; there is no device behind them. boot.sh needs MAGIC_SYSRQ, and that MCONSOLE.
OPTIONS="
  64BIT EXPERT CC_OPTIMIZE_FOR_PERFORMANCE DEBUG_INFO_NONE PRINTK BUG MULTIUSER KALLSYMS STACKTRACE
  POSIX_TIMERS HIGH_RES_TIMERS NO_HZ_IDLE FUTEX EPOLL SIGNALFD TIMERFD EVENTFD AIO SHMEM SYSVIPC
  POSIX_MQUEUE ADVISE_SYSCALLS MEMBARRIER FILE_LOCKING INOTIFY_USER BINFMT_ELF BINFMT_SCRIPT
  PROC_FS PROC_SYSCTL SYSFS TMPFS TMPFS_POSIX_ACL TMPFS_XATTR DEVTMPFS CONFIGFS_FS HOSTFS OVERLAY_FS
  TTY UNIX98_PTYS STDERR_CONSOLE NULL_CHAN MCONSOLE MAGIC_SYSRQ PANIC_ON_OOPS HW_RANDOM
  UML_RANDOM NET UNIX PACKET INET IPV6 NETDEVICES NET_CORE DUMMY UML_NET UML_NET_VECTOR NET_SCHED
  NET_SCH_NETEM VIRTIO_MENU VIRTIO_UML PCI UML_PCI_OVER_VIRTIO CRYPTO CRYPTO_CRC32 CRYPTO_CRC32C
  LIBCRC32C INFINIBAND INFINIBAND_USER_ACCESS INFINIBAND_USER_MAD INFINIBAND_ADDR_TRANS RDMA_RXE
"

die() { printf 'build_uml: error: %s\n' "$*" >&2; exit 1; }

check_programs() {
  local program missing=()
  for program in gcc make flex bison bc xz bzip2; do
    command -v "$program" > /dev/null || missing+=("$program")
  done
  [ ${#missing[@]} -eq 0 ] ||
    die "no ${missing[*]} (apt-get install gcc libc6-dev make flex bison bc xz-utils bzip2)"
}

unpack_source() {
  local package
  package=$(apt-cache depends linux-source | sed -n 's/.*Depends: \(linux-source-[0-9.]*\)$/\1/p')
  [ -n "$package" ] || die "apt knows no linux-source (apt-get update; needs Debian or Ubuntu)"
  apt-get -q -o APT::Sandbox::User=root download "$package"
  dpkg -x "$package"_*.deb .
  mkdir linux
  tar -xf "$(find usr/src -name 'linux-source-*.tar.*')" -C linux --strip-components 1
}

# What vLLM's processes need; uml_map_around.h says why.
patch_source() {
  cp "$HERE/uml_map_around.h" arch/um/kernel/
  sed -i 's/^\tflush_tlb_page(vma, address);$/\tmap_around(vma, address, is_write);/
    /^#include <skas.h>$/a #include "uml_map_around.h"' arch/um/kernel/trap.c
  # vLLM asks /proc/self/status for its memory nodes; cpusets, which fill it in, need SMP.
  sed -i 's/^\tcpuset_task_status_allowed(m, task);$/\tseq_puts(m, "Mems_allowed_list:\\t0\\n");/' \
    fs/proc/array.c
  { grep -q '^.map_around(' arch/um/kernel/trap.c && grep -q Mems_allowed_list fs/proc/array.c; } ||
    die "this kernel's trap.c or array.c has other lines than Linux 6.1's"
}

configure() {
  local option
  # Two polling processes cost each other a tick a turn: 1 ms instead of 10.
  sed -i '/^config HZ$/,/default/s/default 100/default 1000/' arch/um/Kconfig
  {
    # shellcheck disable=SC2086  # words
    printf 'CONFIG_%s=y\n' $OPTIONS
    echo 'CONFIG_UML_PCI_OVER_VIRTIO_DEVICE_ID=1234'
    echo 'CONFIG_CON_ZERO_CHAN="fd:0,fd:1"'
    echo 'CONFIG_CON_CHAN="null"'
    echo 'CONFIG_SSL_CHAN="null"'
  } > ../wanted
  make -s ARCH=um KCONFIG_ALLCONFIG=../wanted allnoconfig > ../configure.log 2>&1 ||
    die "make allnoconfig: $(tail -n 3 ../configure.log)"
  for option in $OPTIONS; do
    grep -qx "CONFIG_$option=y" .config || die "Kconfig dropped CONFIG_$option"
  done
}

mkdir -p "$CACHE"
cd "$CACHE"
exec 9> lock
flock 9 # two builds at once would share the folder
[ ! -x linux ] || { echo "$CACHE/linux is there already"; exit 0; }
check_programs
rm -rf build
mkdir build
cd build
unpack_source
cd linux
patch_source
configure
make -s ARCH=um -j"$JOBS" linux
mv linux "$CACHE/linux"
cd "$CACHE"
rm -rf build
ls -l "$CACHE/linux"
