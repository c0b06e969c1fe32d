#!/bin/busybox sh
# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=dash
# First program of a QEMU guest: mounts the host's root, read-only, under a writable overlay in
# memory and the run's folder at /io, then goes on with boot.sh there.
b=/bin/busybox
$b mkdir -p /proc /sys /dev /host /memory /root
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs devtmpfs /dev
while read -r module; do $b insmod "/modules/$module"; done < /modules/order

options=trans=virtio,version=9p2000.L,msize=512000
$b mount -t 9p -o "$options,ro,cache=loose" host /host
$b mount -t tmpfs -o size=90% tmpfs /memory
$b mkdir -p /memory/upper /memory/work
$b mount -t overlay -o lowerdir=/host,upperdir=/memory/upper,workdir=/memory/work overlay /root

$b mkdir -p /root/io /dev/pts /dev/shm
$b mount -t devpts devpts /dev/pts
$b mount -t tmpfs tmpfs /dev/shm
$b ln -s /proc/self/fd /dev/fd
for directory in proc sys dev; do $b mount --move "/$directory" "/root/$directory"; done
# What the nodes and the host exchange has to be seen at once, hence no cache.
$b mount -t 9p -o "$options,cache=none" io /root/io
exec $b switch_root /root /bin/bash /io/boot.sh
