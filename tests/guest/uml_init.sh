# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
# First program of a User-Mode Linux guest, whose root is the host's, read-only: lays a writable
# overlay in memory over it and the run's folder, GUEST_IO on the host, on /io; then boot.sh.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mount -n -t proc proc /proc
mount -n -t sysfs sysfs /sys
mount -n -t devtmpfs devtmpfs /dev 2>/dev/null
mkdir -p /dev/pts /dev/shm
mount -n -t devpts devpts /dev/pts
mount -n -t tmpfs tmpfs /dev/shm
ln -s /proc/self/fd /dev/fd

root=/mnt/root
mount -n -t tmpfs -o size=80% tmpfs /mnt
mkdir -p /mnt/upper /mnt/work $root
mount -n -t overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work overlay $root
mkdir -p $root/io
mount -n -t hostfs -o "$GUEST_IO" hostfs $root/io
for directory in proc sys dev; do mount -n --move /$directory $root/$directory; done
# perftest reads the CPU's MHz, which User-Mode Linux does not have.
mount -n --bind $root/io/cpuinfo $root/proc/cpuinfo
for vec in "$root"/sys/class/net/vec*; do
  [ -e "$vec" ] && ip link set "${vec##*/}" name "eth${vec##*/vec}"
done
exec chroot $root /bin/bash /io/boot.sh
