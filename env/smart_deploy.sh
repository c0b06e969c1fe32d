#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# smart_deploy.sh --to DIR [--env DIR] [--model DIR] [option]...: stages an environment and a model
# to the own disk of every node of this job, so that engines do not read them from a shared file
# system all at once. Run it in the batch script, or under salloc; without a job it stages here.
#
#   eval "$(env/smart_deploy.sh --to /scratch/$USER --env .venv --model models/llama-3.1-8b)"
#   exec "$RDMA_KV" serve --config job.yaml --set "model.name=$RDMA_KV_MODEL" …
#
#   --to DIR      a folder on the nodes' own disks
#   --env DIR     a Python environment; prints RDMA_KV=…/bin/rdma-kv
#   --model DIR   a model folder; prints RDMA_KV_MODEL=…
#   --verify      read again what is there already, and replace it if a checksum differs
#   --remove      remove what was staged to DIR, of other versions too
# Each goes to DIR/NAME-SUM; SUM is that of its manifest, the SHA-256 of every file. It is copied
# with sbcast, verified on every node, and only then gets its name: what has it is complete, and
# another job on the node may stage the same. What is there already is not copied. TMPDIR of the
# batch script's node holds an archive of the environment meanwhile.
# Exit code: 0 all nodes have it, 1 one has not, 2 for a bad option.
set -euo pipefail
self=$(realpath "${BASH_SOURCE[0]}")
# shellcheck source=env/nodes.sh
. "$(dirname "$self")/nodes.sh"

MANIFEST=.rdma-kv-manifest
MANIFEST_CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/rdma-kv/manifests

say() { printf 'deploy: %s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }
usage() { sed -n '3,/^set -/s/^# \{0,1\}//p' "$self"; }

# On one node

# node_has TARGET VERIFY: whether it was staged there before.
node_has() {
  [ -f "$1/$MANIFEST" ] || return 1
  if [ "$2" = yes ]; then
    (cd "$1" && sha256sum --check --quiet "$MANIFEST" >/dev/null 2>&1)
  else
    (cd "$1" && cut -c 67- "$MANIFEST" | tr '\n' '\0' | xargs -0 stat -t -- >/dev/null 2>&1)
  fi
}

# node_prepare TARGET PARTIAL BYTES VERIFY: makes the folder that is copied to.
node_prepare() {
  local parent free
  parent=$(dirname "$2")
  mkdir -p "$parent"
  # Also what jobs have left that were killed at it, a day ago or longer.
  find "$parent" -maxdepth 1 -name '.partial-*' -user "$(id -u)" -mtime +0 -exec rm -rf {} +
  rm -rf "$2"
  free=$(df --output=avail -B1 "$parent" | tail -1)
  if [ "$free" -lt "$3" ] && ! node_has "$1" "$4"; then
    echo "$parent has $((free >> 20)) MiB free, $(($3 >> 20)) MiB are needed"
    return 1
  fi
  mkdir "$2"
}

# node_folders PARTIAL: makes those of the files to come, which sbcast does not.
node_folders() {
  cd "$1"
  cut -c 67- $MANIFEST | sed 's|/[^/]*$||' | sort -u | tr '\n' '\0' | xargs -0 mkdir -p --
}

# node_finish TARGET PARTIAL SOURCE: unpacks, verifies, and gives it its name.
node_finish() {
  local target=$1 partial=$2 source=$3 script
  cd "$partial"
  if [ -f .tar ]; then tar -xf .tar; rm .tar; fi
  sha256sum --check --quiet $MANIFEST || { echo "not what $source holds"; return 1; }
  if [ -f pyvenv.cfg ]; then
    # Its scripts name the interpreter by its path.
    for script in bin/*; do
      if [ -f "$script" ] && [ ! -L "$script" ] && grep -qIF "$source" "$script"; then
        sed -i "s|$source|$target|g" "$script"
      fi
    done
    grep -v '  \./bin/' $MANIFEST >.manifest.new || true
    find ./bin -type f -exec sha256sum {} + >>.manifest.new
    mv .manifest.new $MANIFEST
  fi
  if [ -e "$target" ]; then
    node_has "$target" yes && { rm -rf "$partial"; return 0; }
    mv "$target" "$partial.old"
  fi
  # It fails if another job was quicker: then that one's is as good.
  mv -T "$partial" "$target" 2>/dev/null || rm -rf "$partial"
  rm -rf "$partial.old"
}

# node_remove DIR: only what was staged; the rest of DIR is not ours.
node_remove() {
  local manifest
  for manifest in "$1"/*/"$MANIFEST"; do
    [ -f "$manifest" ] || continue
    rm -rf "${manifest%/*}"
    echo "removed ${manifest%/*}"
  done
}

# A process of its own for each action, for `set -e` would not hold in a function whose status is
# taken.
if [ "${1:-}" = --on-node ]; then
  shift
  as_node "$self" --this-machine "$@"
  exit
elif [ "${1:-}" = --this-machine ]; then
  shift
  action=$1
  shift
  "node_$action" "$@"
  exit
fi

# On all of them

to='' env_dir='' model='' verify=no remove=no
while [ $# -gt 0 ]; do
  case $1 in
    --to | --env | --model)
      [ $# -ge 2 ] || { usage >&2; exit 2; }
      case $1 in
        --to) to=$2 ;;
        --env) env_dir=$2 ;;
        --model) model=$2 ;;
      esac
      shift 2 ;;
    --verify) verify=yes; shift ;;
    --remove) remove=yes; shift ;;
    -h | --help) usage; exit 0 ;;
    *) say "unknown option $1"; usage >&2; exit 2 ;;
  esac
done
case $to in
  /*) ;;
  *) say "--to DIR must be given, absolute: the nodes' own disk"; exit 2 ;;
esac
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# nodes ACTION ARGUMENT...: on every node; what they say goes to stderr, the same once.
nodes() {
  each_node "$self" --on-node "$@" 2>"$work/srun" >"$work/said" && return
  merge_nodes <"$work/said" >&2
  grep -v '^srun: error: .* Exited with exit code' "$work/srun" >&2 || true
  return 1
}

# copy FILE TARGET: to every node.
copy() {
  if [ -n "${SLURM_JOB_ID:-}" ]; then
    sbcast --force --preserve "$1" "$2" || die "sbcast $1 failed"
  else
    cp --preserve=mode,timestamps "$1" "$2"
  fi
}

# Files of a folder, without what Python writes beside them. A model's may be links to elsewhere.
files_of() { # FOLDER KIND
  local follow=()
  [ "$2" = env ] || follow=(-L)
  (cd "$1" && find "${follow[@]}" . -type f ! -path '*/__pycache__/*' ! -name '.lock' -print0)
}

# make_manifest FOLDER KIND: SHA-256 of all files; remembered as long as names, sizes and times stay.
make_manifest() {
  local key cached
  key=$({ echo "$1"; files_of "$1" "$2" | (cd "$1" && xargs -0 stat -L -c '%n %s %Y') | sort; } |
    sha256sum | cut -c -64)
  cached=$MANIFEST_CACHE/$key
  if [ ! -f "$cached" ]; then
    mkdir -p "$MANIFEST_CACHE"
    files_of "$1" "$2" | (cd "$1" && xargs -0 -n 32 -P "$(nproc)" sha256sum) | sort -k 2 >"$cached.$$"
    mv "$cached.$$" "$cached"
  fi
  cat "$cached"
}

# stage FOLDER KIND: sets `staged` to where it is on the nodes.
stage() {
  local source kind=$2 sum partial bytes began=$SECONDS
  source=$(realpath "$1")
  [ -d "$source" ] || die "there is no folder $1"
  make_manifest "$source" "$kind" >"$work/manifest"
  [ -s "$work/manifest" ] || die "$1 is empty"
  sum=$(sha256sum "$work/manifest")
  staged=$to/$(basename "$source")-${sum:0:12}
  if nodes has "$staged" "$verify" 2>/dev/null; then
    say "$staged is there"
    return
  fi
  bytes=$(files_of "$source" "$kind" | (cd "$source" && xargs -0 stat -L -c %s) |
    awk '{ n += $1 } END { printf "%.0f", n }')
  partial=$to/.partial-${SLURM_JOB_ID:-$$}-${sum:0:12}
  nodes prepare "$staged" "$partial" "$bytes" "$verify" || die "$to cannot be used"
  copy "$work/manifest" "$partial/$MANIFEST"
  if [ "$kind" = env ]; then
    tar -C "$source" --exclude=__pycache__ --exclude=.lock -cf "$work/tar" .
    copy "$work/tar" "$partial/.tar"
    rm "$work/tar"
  else
    nodes folders "$partial" || die "$to cannot be written"
    cut -c 67- "$work/manifest" >"$work/names"
    local name
    while IFS= read -r name <&3; do
      copy "$source/$name" "$partial/$name"
    done 3<"$work/names"
  fi
  nodes finish "$staged" "$partial" "$source" || die "$staged is not on all nodes"
  say "$staged: $((bytes >> 20)) MiB in $((SECONDS - began)) s"
}

if [ "$remove" = yes ]; then
  nodes remove "$to" || die "not all of it could be removed"
  merge_nodes <"$work/said" >&2
  exit
fi
[ -n "$env_dir$model" ] || { say "neither --env nor --model"; exit 2; }
if [ -n "$env_dir" ]; then
  stage "$env_dir" env
  printf 'RDMA_KV=%q\n' "$staged/bin/rdma-kv"
fi
if [ -n "$model" ]; then
  stage "$model" model
  printf 'RDMA_KV_MODEL=%q\n' "$staged"
fi
