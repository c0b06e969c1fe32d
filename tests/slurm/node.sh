#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# node.sh NAME ADDRESS FOLDER SOCKET SHARED...: process 1 of a lab's machine, in namespaces of its
# own. It makes the machine, says so by FOLDER/NAME/up, then only reaps.
set -euo pipefail
name=$1 address=$2 folder=$3 socket=$4
shift 4
own=$folder/$name

# As the one who wires this machine sees it: /proc is still that of the namespace outside.
read -r pid _ < /proc/self/stat
mount -t proc proc /proc
hostname "$name"
ip link set lo up

mount --bind "$folder/hosts" /etc/hosts
mount -t tmpfs shm /dev/shm

# FOLDER MODE: an empty one of its own. What the machines share may lie in the old one.
empty() {
  mkdir -p "$own$1"
  mount --bind "$1" "$own$1"
  mount -t tmpfs -o "mode=$2" own "$1"
  for shared in "${shares[@]}"; do
    case $shared in
      "$1"/*)
        mkdir -p "$shared"
        mount --bind "$own$shared" "$shared" ;;
    esac
  done
  umount "$own$1"
}
shares=("$@")
empty /tmp 1777
# Python may lie in there, and others than root are to start it.
empty /root 755

echo "$pid" > "$own/pid.new"
mv "$own/pid.new" "$own/pid"
if [ "$name" = ctl ]; then
  ip link add eth0 type bridge
else
  # Not by /sys, which is that of the namespace outside.
  until ip link show eth0 >/dev/null 2>&1; do sleep 0.01; done
fi
ip addr add "$address/24" dev eth0
ip link set eth0 up

install -m 400 "$folder/munge.key" "$own/munge.key"
munged --force --socket="$socket" --key-file="$own/munge.key" --log-file="$own/munged.log" \
  --seed-file="$own/munge.seed" --pid-file="$own/munged.pid"
touch "$own/up"

# With a trap or a loop here bash would not reap what other processes leave behind.
sleep infinity &
wait $!
