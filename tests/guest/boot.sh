# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
# PID 1 of a guest once its root is there: makes the rails, waits for the other nodes, runs the
# command, leaves output and exit status in /io, and powers off. A program's start takes an
# emulated CPU 30 ms or more, hence what is done with the shell's own means.
# GUEST_NODE comes from the kernel's command line, everything else from /io/environment.
# shellcheck source=/dev/null
. /io/environment
export GUEST_IP=10.77.0.$((GUEST_NODE + 1))
export GUEST_PEER=10.77.0.$(((GUEST_NODE + 1) % GUEST_NODES + 1))
PATH=$PATH:/usr/sbin:/sbin
files=/io/node$GUEST_NODE

power_off() {
  echo o > /proc/sysrq-trigger
  sleep 10
  exit 1 # panics, which ends the guest too
}

fail() {
  echo "guest: $*"
  power_off
}

start_other_cpus() {
  local online
  for online in /sys/devices/system/cpu/cpu[1-9]*/online; do
    [ ! -e "$online" ] || echo 1 > "$online"
  done
}

has_ipv4_gid() {
  local gid
  read -r gid < "/sys/class/infiniband/$1/ports/1/gids/1" && [[ $gid == *:ffff:0a* ]]
} 2> /dev/null

# rxe<rail> on eth<rail>, 10.<77 + rail>.0.<node + 1>/24. A single guest has dummy netdevs: rxe
# short-cuts traffic to itself before it reaches one.
make_rail() {
  local eth=eth$1 rxe=rxe$1 net=$((77 + $1)) tries
  {
    [ -e "/sys/class/net/$eth" ] || echo "link add $eth address 52:54:00:$net:00:01 type dummy"
    # 4400: room for RoCE's largest path MTU, 4096 bytes, and its headers.
    echo "link set $eth mtu 4400 up"
    echo "address add 10.$net.0.$((GUEST_NODE + 1))/24 dev $eth"
  } | ip -batch - || return
  rdma link add "$rxe" type rxe netdev "$eth" || return
  for ((tries = 0; tries < 50; tries++)); do # the GID appears a moment after the address
    has_ipv4_gid "$rxe" && return
    sleep 0.1
  done
  echo "guest: $rxe got no GID for its IPv4 address"
  return 1
}

wait_for_nodes() {
  local uptime node tries
  read -r uptime _ < /proc/uptime
  echo "$uptime" > "$files.ready.new"
  mv "$files.ready.new" "$files.ready"
  for ((node = 0; node < GUEST_NODES; node++)); do
    for ((tries = 0; tries < 600; tries++)); do
      [ -e "/io/node$node.ready" ] && continue 2
      sleep 0.1
    done
    fail "node $node did not start within 60 s"
  done
}

exec > /dev/console 2>&1 < /dev/null
echo "guest$GUEST_NODE" > /proc/sys/kernel/hostname
ulimit -l unlimited
start_other_cpus
ip link set lo up
for ((rail = 0; rail < GUEST_RAILS; rail++)); do
  make_rail "$rail" || fail "cannot make rail $rail"
done
wait_for_nodes
cd "$GUEST_FOLDER" || fail "no folder $GUEST_FOLDER"
bash /io/command.sh > "$files.out" 2>&1
status=$?
dmesg > "$files.dmesg"
echo $status > "$files.status.new"
mv "$files.status.new" "$files.status"
power_off
