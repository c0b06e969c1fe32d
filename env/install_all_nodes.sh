#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# install_all_nodes.sh [option]... [-- SRUN_OPTION...]: the environment that a job's ranks run in.
#
#   env/install_all_nodes.sh                     one environment for all nodes: .venv of this
#                                                repository, which must be on a shared file system
#   env/install_all_nodes.sh --env /shared/env   the same elsewhere
#   env/install_all_nodes.sh --each-node --env /local/env -- -N 4 -p gpu
#                                                one on each node's own disk, through srun
#   env/install_all_nodes.sh --check -- -N 4     what each node lacks; nodes alike are named together
#
#   --env DIR        the environment (.venv)
#   --each-node      node by node: the nodes of this job, else those that srun gives for SRUN_OPTION
#   --check          install nothing
#   --module NAME    an environment module to load first; may be repeated
#   --pip ARGUMENTS  of one `pip install`, in place of `vllm` and then this repository; may be
#                    repeated
# System packages come by apt-get for root; else say --module for Python >= 3.10 and a C++ compiler,
# or have conda on PATH. PYTHON chooses the interpreter. Run again, it does only what changed.
# Exit code: 0 all is there, 1 something is missing or failed, 2 for a bad option.
set -euo pipefail
self=$(realpath "${BASH_SOURCE[0]}")
root=$(dirname "$(dirname "$self")")
# shellcheck source=env/nodes.sh
. "$root/env/nodes.sh"

PACKAGES=(g++ python3-dev python3-venv libnuma1 libibverbs-dev)

say() { printf 'install: %s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }
usage() { sed -n '3,/^set -/s/^# \{0,1\}//p' "$self"; }

env_dir=$root/.venv
action=install
where=here
modules=()
pip_installs=()
options=() # for this script on the nodes
all=("$@")
while [ $# -gt 0 ]; do
  case $1 in
    --env | --module | --pip)
      [ $# -ge 2 ] || { usage >&2; exit 2; }
      case $1 in
        --env) env_dir=$(realpath -m "$2") ;;
        --module) modules+=("$2") ;;
        --pip) pip_installs+=("$2") ;;
      esac
      [ "$1" = --env ] || options+=("$1" "$2")
      shift 2 ;;
    --each-node) where=each; shift ;;
    --check) action=check; shift ;;
    --on-node) where=node; shift ;; # from here on: for this script itself
    --this-machine) where=this; shift ;;
    --) shift; SRUN_OPTIONS=("$@"); break ;;
    -h | --help) usage; exit 0 ;;
    *) say "unknown option $1"; usage >&2; exit 2 ;;
  esac
done
[ ${#pip_installs[@]} -gt 0 ] || pip_installs=(vllm "${root}[mpich]")

# On one machine

load_modules() {
  [ ${#modules[@]} -gt 0 ] || return 0
  # `module` is a function, which a login shell has from these.
  local file
  for file in /etc/profile.d/modules.sh /etc/profile.d/lmod.sh /etc/profile.d/z00_lmod.sh; do
    # shellcheck disable=SC1090
    type module >/dev/null 2>&1 || [ ! -r "$file" ] || { set +u; . "$file"; set -u; }
  done
  type module >/dev/null 2>&1 || die "no environment modules on $(uname -n), but --module is given"
  local name
  for name in "${modules[@]}"; do
    set +u
    module load "$name" || die "module load $name failed on $(uname -n)"
    set -u
  done
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

find_python() {
  local name
  for name in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.10; do
    if is_new_enough "$name"; then command -v "$name"; return; fi
  done
  return 1
}

# missing_tools PYTHON: what building the environment with it lacks.
missing_tools() {
  command -v "${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || echo "a C++ compiler"
  if [ -z "$1" ]; then echo "Python >= 3.10"; return; fi
  "$1" -c 'import ensurepip, venv' 2>/dev/null || echo "Python's venv"
  [ -e "$("$1" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] ||
    echo "Python's headers"
}

# Sets `python`, with all that is needed beside it.
provide_python() {
  python=$(find_python) || python=
  local missing
  missing=$(missing_tools "$python" | paste -sd,)
  [ -n "$missing" ] || return 0
  say "$(uname -n) lacks $missing"
  if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${PACKAGES[@]}" \
      >/dev/null
    python=$(find_python) || die "Debian's python3 is older than 3.10: set PYTHON"
  elif command -v conda >/dev/null; then
    [ -x "$env_dir.conda/bin/python" ] ||
      conda create -y -q -p "$env_dir.conda" python=3.12 gxx_linux-64 rdma-core >/dev/null
    python=$env_dir.conda/bin/python
    PATH=$env_dir.conda/bin:$PATH
  else
    die "give --module for $missing, put conda on PATH, or ask for: apt-get install ${PACKAGES[*]}"
  fi
}

# What the environment is made of: if that is the same as last time, so is the environment.
inputs() {
  printf '%s\n' "${pip_installs[@]}" "$("$python" -V)"
  local word
  # shellcheck disable=SC2068  # the words of all
  for word in ${pip_installs[@]}; do
    if [ -f "$word" ]; then sha256sum "$word"; fi
    if [ "${word%%\[*}" = "$root" ]; then
      find "$root/src" "$root/native" "$root/pyproject.toml" -type f ! -name '*.pyc' -print0 |
        sort -z | xargs -0 sha256sum
    fi
  done
}

install_here() {
  load_modules
  provide_python
  mkdir -p "$(dirname "$env_dir")"
  exec 9>"$env_dir.lock"
  flock -n 9 || { say "waiting for another installation of $env_dir"; flock 9; }
  local sum arguments
  sum=$(inputs | sha256sum)
  if [ "$(cat "$env_dir/.installed" 2>/dev/null)" = "$sum" ] && "$env_dir/bin/python" -c ''; then
    say "$env_dir is up to date"
    return
  fi
  say "$env_dir with $("$python" -V)"
  "$python" -m venv "$env_dir"
  rm -f "$env_dir/.installed"
  for arguments in "${pip_installs[@]}"; do
    say "pip install $arguments"
    # shellcheck disable=SC2086  # they are several words
    "$env_dir/bin/python" -m pip install -q --disable-pip-version-check $arguments
  done
  echo "$sum" >"$env_dir/.installed"
}

# Lines of what this machine lacks (and then fails), and of what is only good to know.
check_here() {
  load_modules
  if ! [ -x "$env_dir/bin/python" ]; then
    echo "lacks the environment: nothing in $env_dir"
    return 1
  fi
  "$env_dir/bin/python" - <<'PYTHON'
import json
import subprocess
import sys

command = [sys.executable, "-m", "rdma_kv_cache.cli", "doctor", "--json"]
done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
try:
    report = json.loads(done.stdout)
except ValueError:
    last = done.stderr.strip().rpartition("\n")[2]
    sys.exit(f"lacks rdma-kv in {sys.prefix}: {last}")
needed = {"vllm", "mpi launcher", "native extension"}
lacks = not report["usable"]
for check in report["checks"]:
    if check["ok"] is False:
        is_needed = check["name"] in needed
        lacks |= is_needed
        print("lacks" if is_needed else "note:", f"{check['name']}: {check['detail']}")
if not report["usable"]:
    print("lacks a backend that works")
sys.exit(lacks)
PYTHON
}

# On all nodes

on_nodes() {
  local again=("$self" --on-node --env "$env_dir" ${options[@]+"${options[@]}"})
  [ "$action" = install ] || again+=(--check)
  [ -z "${PYTHON:-}" ] || again=(env PYTHON="$PYTHON" "${again[@]}")
  # What srun says of a task that failed, the task has said better.
  each_node "${again[@]}" 2> >(grep -v '^srun: error: .* Exited with exit code' >&2) | merge_nodes
}

case $where-$action in
  this-*) "${action}_here" ;;
  # A process of its own, for `set -e` would not hold in a function whose status is taken.
  node-*) as_node "$self" --this-machine "${all[@]:1}" ;;
  here-install) install_here ;;
  *) on_nodes ;;
esac
